// The network beside the page: it runs here, so that the page answers meanwhile, and ends when the worker is ended.

import { at, CELL, curveOf, estimate, isWhite, windows } from "./estimate.js";

// Nothing beyond 22 pixels reaches a pixel, and tiles begin at multiples of 4: the result is that of the whole picture.
const HALO = 24;
// Pixels on each side over which brightness is averaged for the level.
const RADIUS = 2;
// A pixel stays gray where all pixels within so many pixels are.
const BORDER = 3;
// The highest level that the networks know.
const STRONGEST = 75 / 255;

let runtime = null;
// The picture that came last, and what the estimator saw in it: it may be denoised again with other settings.
let last = null;

// The runtime and the estimator, on WebGPU where there is a graphics card and `gpu` allows it.
async function load(gpu) {
  const adapter = gpu && self.navigator.gpu ? await self.navigator.gpu.requestAdapter().catch(() => null) : null;
  const usable = adapter !== null && !adapter.info?.isFallbackAdapter; // a card, and none that the processor plays
  const ort = await import(usable ? "./runtime/ort.webgpu.min.mjs" : "./runtime/ort.wasm.min.mjs");
  ort.env.wasm.wasmPaths = new URL("./runtime/", import.meta.url).href;
  // Threads need headers (COOP, COEP) that few file servers send.
  const threads = self.crossOriginIsolated ? Math.min(self.navigator.hardwareConcurrency || 1, 8) : 1;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  const open = (name, provider) =>
    ort.InferenceSession.create(new URL(`./models/${name}.onnx`, import.meta.url).href, { executionProviders: [provider] });
  const noise = await open("noise", "wasm");
  const how = `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`;
  const chosen = usable ? { provider: "webgpu", how: "WebGPU", tile: 512 } : { provider: "wasm", how, tile: 256 };
  return { ort, noise, open, networks: {}, ...chosen };
}

// What `work` makes of the network of that name, which is fetched when it is first needed. Where WebGPU cannot load the
// network, or ends while it runs (a driver, its memory), the processor does the work from the start: by the other
// runtime, because the one whose WebGPU failed never ends a call again.
async function withNetwork(name, work) {
  const run = async () => work((runtime.networks[name] ??= await runtime.open(name, runtime.provider)));
  if (runtime.provider === "webgpu") {
    try {
      return await run();
    } catch (error) {
      console.warn("WebGPU does not run the network, the processor does:", error);
      runtime = await load(false);
    }
  }
  return run();
}

// An index beyond the border, mirrored into the picture.
function mirrored(index, size) {
  const period = Math.max(2 * (size - 1), 1);
  const phase = ((index % period) + period) % period;
  return Math.min(phase, period - phase);
}

// Rows and columns of RGBA bytes as planes of floats in [0, `white`].
function planes(picture, [top, bottom], [left, right], white = 1) {
  const [height, width] = [bottom - top, right - left];
  const values = new Float32Array(3 * height * width);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const from = 4 * ((top + y) * picture.width + left + x);
      for (let c = 0; c < 3; c++) values[(c * height + y) * width + x] = (white * picture.pixels[from + c]) / 255;
    }
  }
  return values;
}

// The level of each pixel of a window, from the brightness around it.
function levels(picture, [top, bottom], [left, right], curve, strength) {
  const [height, width, side] = [bottom - top, right - left, 2 * RADIUS + 1];
  const columns = Array.from({ length: width + 2 * RADIUS }, (_, x) => mirrored(left + x - RADIUS, picture.width));
  const sums = new Float32Array((height + 2 * RADIUS) * width);
  const row = new Float32Array(columns.length);
  for (let y = 0; y < height + 2 * RADIUS; y++) {
    const start = mirrored(top + y - RADIUS, picture.height) * picture.width;
    columns.forEach((column, x) => {
      const from = 4 * (start + column);
      row[x] = (picture.pixels[from] + picture.pixels[from + 1] + picture.pixels[from + 2]) / 765;
    });
    for (let x = 0; x < width; x++) {
      let sum = 0;
      for (let k = 0; k < side; k++) sum += row[x + k];
      sums[y * width + x] = sum;
    }
  }
  const result = new Float32Array(height * width);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      let sum = 0;
      for (let k = 0; k < side; k++) sum += sums[(y + k) * width + x];
      result[y * width + x] = Math.min(strength * at(curve, sum / (side * side)), 1);
    }
  }
  return result;
}

async function look(picture) {
  const { ort, noise } = runtime;
  const all = [];
  for (const rows of windows(picture.height)) {
    for (const columns of windows(picture.width)) {
      const size = [rows[1] - rows[0], columns[1] - columns[0]];
      if (Math.min(...size) < CELL) continue;
      const input = new ort.Tensor("float32", planes(picture, rows, columns), [1, 3, ...size]);
      const { cells } = await noise.run({ input });
      const count = cells.dims[2] * cells.dims[3];
      for (let index = 0; index < count; index++) {
        const [logLevel, logVariance, coarseness, brightness, usable] = [0, 1, 2, 3, 4].map(
          (channel) => cells.data[channel * count + index],
        );
        all.push({ logLevel, logVariance, coarseness, brightness, usable: usable > 0.5 });
      }
    }
  }
  return estimate(all);
}

// Whether all pixels within BORDER of each pixel of a window have equal channels: fastden/inference/tiling.py.
function grayInside(picture, [top, bottom], [left, right]) {
  const { pixels } = picture;
  const width = right - left;
  const result = new Uint8Array((bottom - top) * width).fill(1);
  const coloured = new Uint8Array(width); // whether a pixel of the row within BORDER of the column has a colour
  for (let y = Math.max(top - BORDER, 0); y < Math.min(bottom + BORDER, picture.height); y++) {
    coloured.fill(0);
    for (let x = Math.max(left - BORDER, 0); x < Math.min(right + BORDER, picture.width); x++) {
      const from = 4 * (y * picture.width + x);
      if (pixels[from] === pixels[from + 1] && pixels[from] === pixels[from + 2]) continue;
      coloured.fill(1, Math.max(x - BORDER - left, 0), Math.min(x + BORDER + 1, right) - left);
    }
    for (let row = Math.max(y - BORDER, top); row < Math.min(y + BORDER + 1, bottom); row++) {
      const start = (row - top) * width;
      for (let x = 0; x < width; x++) if (coloured[x]) result[start + x] = 0;
    }
  }
  return result;
}

async function denoise(picture, network, curve, strength) {
  const { ort, tile } = runtime;
  // Above the strongest noise that networks know, the picture is divided until its noise is that: fastden/inference/run.py.
  const white = Math.min(STRONGEST / (strength * Math.max(...curve)), 1);
  const result = new Uint8ClampedArray(picture.pixels);
  const area = picture.width * picture.height;
  let done = 0;
  for (let y = 0; y < picture.height && strength > 0; y += tile) {
    for (let x = 0; x < picture.width; x += tile) {
      const ends = [Math.min(y + tile, picture.height), Math.min(x + tile, picture.width)];
      const rows = [Math.max(y - HALO, 0), Math.min(ends[0] + HALO, picture.height)];
      const columns = [Math.max(x - HALO, 0), Math.min(ends[1] + HALO, picture.width)];
      const [height, width] = [rows[1] - rows[0], columns[1] - columns[0]];
      const plane = height * width;
      const { output } = await network.run({
        input: new ort.Tensor("float32", planes(picture, rows, columns, white), [1, 3, height, width]),
        sigma: new ort.Tensor("float32", levels(picture, rows, columns, curve, strength * white), [1, 1, height, width]),
      });
      const gray = grayInside(picture, [y, ends[0]], [x, ends[1]]);
      for (let row = y; row < ends[0]; row++) {
        for (let column = x; column < ends[1]; column++) {
          const from = (row - rows[0]) * width + column - columns[0];
          const to = 4 * (row * picture.width + column);
          for (let c = 0; c < 3; c++) result[to + c] = (255 / white) * output.data[c * plane + from];
          if (gray[(row - y) * (ends[1] - x) + column - x]) {
            // What is gray stays gray: its channels are averaged, as the command does.
            const mean = (output.data[from] + output.data[plane + from] + output.data[2 * plane + from]) / 3;
            result[to] = result[to + 1] = result[to + 2] = (255 / white) * mean;
          }
        }
      }
      done += (ends[0] - y) * (ends[1] - x);
      self.postMessage({ progress: done / area });
    }
  }
  return result;
}

// Without a picture in it, a message is about the last one.
self.onmessage = async ({ data: { picture, sigma, strength, gpu } }) => {
  try {
    runtime ??= await load(gpu);
    if (picture) last = { picture, seen: await look(picture) };
    const { seen } = last;
    self.postMessage({ seen });
    const curve = sigma === "auto" ? curveOf(seen) : Array(seen.sigmas.length).fill(sigma / 255);
    const name = sigma !== "auto" || isWhite(seen) ? "color" : "photo";
    const { pixels, seconds } = await withNetwork(name, async (network) => {
      const start = performance.now();
      const pixels = await denoise(last.picture, network, curve, strength);
      return { pixels, seconds: (performance.now() - start) / 1000 };
    });
    const { width, height } = last.picture;
    self.postMessage({ pixels, width, height, seen, seconds, name, how: runtime.how }, [pixels.buffer]);
  } catch (error) {
    self.postMessage({ error: String(error?.message ?? error) });
  }
};
