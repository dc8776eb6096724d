// The noise of a picture from what the estimator's network says of its cells: fastden/inference/estimate.py and
// fastden/network/level.py in JavaScript. tests/ui/test_browser_page.py compares the two.

export const KNOTS = 8;
export const CELL = 8;
const FLOOR = 0.25 / 255;
const [BEND, SLOPE, RIDGE] = [0.01, 0.002, 1e-6];
const [FAR, FITS] = [0.3, 6];
const LEAST_CELLS = 4;
const HIGHEST = 75 / 255;
const [CLEAN, COARSE] = [1.0, 0.65];
const [WHITE_UNTIL, CERTAIN_UNTIL, UNCERTAIN_FROM] = [0.55, 0.45, 0.85];
const COARSENESS_SHARE = 0.1;
const [WHOLE, CROP, CROPS] = [1024, 256, 4];

/** Where an axis of `size` pixels is looked at: [first, last + 1], several times. */
export function windows(size) {
  if (size <= WHOLE) return [[0, size]];
  return Array.from({ length: CROPS }, (_, index) => {
    const start = Math.floor(((2 * index + 1) * size) / (2 * CROPS)) - CROP / 2;
    const aligned = Math.floor(start / CELL) * CELL;
    return [aligned, aligned + CROP];
  });
}

/** The value of a curve over brightness, 0 to 1, at `brightness`. */
export function at(curve, brightness) {
  const position = Math.min(Math.max(brightness, 0), 1) * (KNOTS - 1);
  const knot = Math.min(Math.floor(position), KNOTS - 2);
  return curve[knot] + (curve[knot + 1] - curve[knot]) * (position - knot);
}

// The differences of first or second order between neighbours, squared and summed, as a matrix.
function penalty(differences) {
  const matrix = Array.from({ length: KNOTS }, () => new Float64Array(KNOTS));
  for (let row = 0; row + differences.length <= KNOTS; row++) {
    differences.forEach((a, i) => differences.forEach((b, j) => { matrix[row + i][row + j] += a * b; }));
  }
  return matrix;
}
const [SLOPES, BENDS] = [penalty([-1, 1]), penalty([1, -2, 1])];

function solve(matrix, side) {
  const rows = matrix.map((row, index) => [...row, side[index]]);
  for (let pivot = 0; pivot < KNOTS; pivot++) { // positive definite: no exchange of rows is needed
    for (let row = pivot + 1; row < KNOTS; row++) {
      const factor = rows[row][pivot] / rows[pivot][pivot];
      for (let column = pivot; column <= KNOTS; column++) rows[row][column] -= factor * rows[pivot][column];
    }
  }
  const result = new Float64Array(KNOTS);
  for (let row = KNOTS - 1; row >= 0; row--) {
    let value = rows[row][KNOTS];
    for (let column = row + 1; column < KNOTS; column++) value -= rows[row][column] * result[column];
    result[row] = value / rows[row][row];
  }
  return result;
}

// Weighted least squares in log levels, nearly straight where no cell lies.
function fit(cells, weights) {
  const total = Math.max(weights.reduce((sum, weight) => sum + weight, 0), 1e-12);
  let mean = 0;
  cells.forEach((cell, index) => { mean += (weights[index] / total) * cell.logLevel; });
  const matrix = BENDS.map((row, i) => row.map((bend, j) => BEND * bend + SLOPE * SLOPES[i][j] + (i === j ? RIDGE : 0)));
  const side = new Float64Array(KNOTS);
  cells.forEach((cell, index) => {
    const position = Math.min(Math.max(cell.brightness, 0), 1) * (KNOTS - 1);
    const knot = Math.min(Math.floor(position), KNOTS - 2);
    const parts = [[knot, knot + 1 - position], [knot + 1, position - knot]];
    for (const [i, a] of parts) {
      const weighted = (weights[index] / total) * a;
      side[i] += weighted * (cell.logLevel - mean);
      for (const [j, b] of parts) matrix[i][j] += weighted * b;
    }
  });
  return solve(matrix, side).map((value) => value + mean);
}

/**
 * The estimate from the cells of a picture.
 * @param {{logLevel: number, logVariance: number, coarseness: number, brightness: number, usable: boolean}[]} all
 * @returns {{sigmas: number[], sigma: number, coarseness: number, uncertainty: number, decided: boolean}} sigmas and sigma on
 *   the scale 0-255
 */
export function estimate(all) {
  const cells = all.filter((cell) => cell.usable);
  if (cells.length < LEAST_CELLS) return { sigmas: Array(KNOTS).fill(0), sigma: 0, coarseness: 0.5, uncertainty: 0, decided: false };
  const weights = cells.map((cell) => Math.exp(-cell.logVariance));
  let own = weights.map(() => 1);
  let curve = null;
  for (let round = 0; round < FITS; round++) {
    curve = fit(cells, weights.map((weight, index) => weight * own[index]));
    own = cells.map((cell) => {
      const distance = Math.abs(cell.logLevel - at(curve, cell.brightness));
      return Math.min(FAR / Math.max(distance, 1e-6), 1);
    });
  }
  const levels = Array.from(curve, (value) => Math.exp(value)).map((level) => (level > FLOOR ? Math.min(level, HIGHEST) : 0));
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const sigma = sum(cells.map((cell) => at(levels, cell.brightness))) / cells.length;
  const total = sum(weights);
  let below = 0;
  const order = [...cells.keys()].sort((a, b) => cells[a].coarseness - cells[b].coarseness);
  const tenth = order.find((index) => (below += weights[index]) >= COARSENESS_SHARE * total) ?? order[order.length - 1];
  return {
    sigmas: levels.map((level) => 255 * level),
    sigma: 255 * sigma,
    coarseness: Math.min(Math.exp(cells[tenth].coarseness), 1),
    uncertainty: Math.exp(sum(cells.map((cell, index) => weights[index] * cell.logVariance)) / (2 * total)),
    decided: true,
  };
}

/** What the network takes: levels on the scale 0-1, noise that neighbours share on the scale of white noise. */
export function curveOf({ sigmas, coarseness, uncertainty }) {
  const ramp = (value, from, to) => Math.min(Math.max((value - from) / (to - from), 0), 1);
  const factor = 1 + ramp(coarseness, 0.5, 1) * (1 - ramp(uncertainty, CERTAIN_UNTIL, UNCERTAIN_FROM));
  return sigmas.map((sigma) => Math.min((factor * sigma) / 255, HIGHEST));
}

/** Whether each pixel plainly has noise of its own: the model for white noise removes it best. */
export function isWhite({ sigmas, coarseness, uncertainty }) {
  return Math.max(...sigmas) > 0 && coarseness < WHITE_UNTIL && uncertainty < CERTAIN_UNTIL;
}

/** How noisy a picture is, for a person who knows no sigma. */
export function inWords({ sigmas, sigma, coarseness, decided }) {
  if (!decided) return "Too little to judge by (flat, clipped or tiny): taken as clean.";
  if (sigma < CLEAN) return `Hardly any noise (level ${sigma.toFixed(1)}).`;
  const amounts = [[5, "A little noise"], [15, "Clear noise"], [35, "Strong noise"], [Infinity, "Very strong noise"]];
  const amount = amounts.find(([most]) => sigma < most)[1];
  const [shadows, lights] = [at(sigmas, 0.15), at(sigmas, 0.8)];
  const uneven = Math.max(shadows, lights) > 1.4 * Math.min(shadows, lights);
  const where = uneven ? `, most in the ${shadows > lights ? "shadows" : "lights"}` : "";
  const grain = coarseness > COARSE ? "coarse" : "fine";
  return `${amount} of ${grain} grain${where} (level ${sigma.toFixed(1)} of 255).`;
}
