// The page that denoises in the visitor's browser: a picture in, a slider between before and after, a picture out.

import "./compare.js";
import { inWords } from "./estimate.js";

// Beyond it a browser's canvas and memory do not hold a picture and its copies.
const MOST = 40e6;
const find = (name) => document.querySelector(`#fastden-page ${name}`);
const parts = Object.fromEntries(
  ["drop", "file", "status", "bar", "cancel", "save", "compare", "settings", "strength", "sigma", "auto", "again"].map(
    (name) => [name, find(`.${name}`)],
  ),
);

// It is kept for the next picture with what it loaded, and ended where a run is cancelled or fails.
let worker = null;
// The file whose pixels the worker has.
let sent = null;
// The run that is going on; a run that is not this one any more shows nothing.
let current = null;
let file = null;
let urls = [];
let gpu = true;
// Told with every message about a picture: that others were dropped with it.
let left = "";

function say(text, wrong = false) {
  parts.status.textContent = [text, left].filter(Boolean).join(" ");
  parts.status.classList.toggle("wrong", wrong);
}

function show(part, visible) {
  parts[part].hidden = !visible;
}

// Ends what is going on; its worker, and the memory that it holds, go with it.
function stop() {
  if (current !== null) {
    worker?.terminate();
    worker = sent = null;
  }
  rest();
}

function rest() {
  current = null;
  show("bar", false);
  show("cancel", false);
  parts.again.disabled = file === null;
}

function clear() {
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = [];
  parts.compare.replaceChildren();
  show("save", false);
}

// The kinds of pictures that may hold several frames, by the bytes that they begin with; a name may say another.
const MOVING = [
  [/^GIF8/, "image/gif"],
  [/^\x89PNG/, "image/png"],
  [/^RIFF.{4}WEBP/s, "image/webp"],
  [/^.{4}ftypavi[fs]/s, "image/avif"],
];

// How many frames a picture has; 1 where the browser cannot tell.
async function framesOf(file) {
  const start = String.fromCharCode(...new Uint8Array(await file.slice(0, 12).arrayBuffer()));
  const type = MOVING.find(([pattern]) => pattern.test(start))?.[1];
  if (type === undefined || !("ImageDecoder" in self)) return 1;
  let decoder = null;
  try {
    decoder = new ImageDecoder({ data: await file.arrayBuffer(), type });
    await Promise.all([decoder.tracks.ready, decoder.completed]);
    return Math.max(1, ...Array.from(decoder.tracks, (track) => track.frameCount));
  } catch {
    return 1; // damage, or a type that is not decoded here
  } finally {
    decoder?.close();
  }
}

async function pixelsOf(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name}: not a picture that this browser reads; accepted: JPEG, PNG, WebP, AVIF`);
  }
  try {
    const { width, height } = bitmap;
    if (width * height > MOST) {
      throw new Error(
        `${file.name}: ${width} x ${height} pixels; accepted here: at most ${MOST / 1e6} megapixels. ` +
          "The command fastden denoise takes more.",
      );
    }
    const frames = await framesOf(file);
    if (frames > 1) throw new Error(`${file.name}: an animation of ${frames} frames; accepted: one picture`);
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    return { width, height, pixels: context.getImageData(0, 0, width, height).data };
  } finally {
    bitmap.close();
  }
}

function encoded(picture, type) {
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  canvas.getContext("2d").putImageData(new ImageData(picture.pixels, picture.width, picture.height), 0, 0);
  return canvas.convertToBlob({ type, quality: 0.95 });
}

async function run() {
  stop();
  clear();
  parts.again.disabled = true;
  say(`Reading ${file.name} ...`);
  show("bar", true);
  show("cancel", true);
  parts.bar.removeAttribute("value");
  const mine = (current = {});
  const given = file;
  try {
    // The worker has the pixels of a picture that is denoised again.
    const picture = sent === given ? null : await pixelsOf(given);
    if (current !== mine) return; // cancelled meanwhile
    worker ??= new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
    sent = given;
    const sigma = parts.auto.checked ? "auto" : Number(parts.sigma.value);
    const done = await new Promise((resolve, reject) => {
      worker.onerror = (event) => reject(new Error(event.message || "this copy of the pages was built without the network"));
      worker.onmessage = ({ data }) => {
        if (data.error) reject(new Error(data.error));
        else if (data.progress) parts.bar.value = data.progress;
        else if (data.pixels) resolve(data);
        else {
          say(`${inWords(data.seen)} Denoising ...`);
          if (parts.auto.checked) setSigma(data.seen.sigma);
        }
      };
      // The pixels move to the worker: they may have 160 MB.
      const settings = { sigma, strength: Number(parts.strength.value), gpu };
      worker.postMessage({ picture, ...settings }, picture ? [picture.pixels.buffer] : []);
    });
    if (current !== mine) return;
    gpu = done.how === "WebGPU"; // what failed once is not tried again
    const { width, height } = done;
    const lossy = given.type === "image/jpeg";
    const shown = await encoded(done, "image/png");
    const saved = lossy ? await encoded(done, "image/jpeg") : shown;
    if (current !== mine) return; // another picture, or Cancel, came meanwhile
    offer(given, shown, saved, lossy);
    const megapixels = (width * height) / 1e6;
    const how = `by the model ${done.name} in ${done.seconds.toFixed(1)} s (${done.how})`;
    say(`${inWords(done.seen)} ${megapixels.toFixed(1)} megapixels ${how}.`);
    parts.status.dataset.seconds = done.seconds;
    parts.status.dataset.how = done.how;
    rest();
  } catch (error) {
    if (current === mine) {
      say(error.message, true);
      stop();
    }
  }
}

function offer(given, shown, saved, lossy) {
  urls = [given, shown, saved].map((blob) => URL.createObjectURL(blob));
  const compare = document.createElement("fastden-compare");
  compare.setAttribute("before", urls[0]);
  compare.setAttribute("after", urls[1]);
  parts.compare.replaceChildren(compare);
  parts.save.href = urls[2];
  parts.save.download = `${given.name.replace(/\.\w+$/, "")}-clean.${lossy ? "jpg" : "png"}`;
  show("save", true);
}

function setSigma(value) {
  parts.sigma.value = value;
  parts.sigma.nextElementSibling.textContent = Number(value).toFixed(1);
}

function take(files) {
  if (!files.length) return;
  [file] = files;
  left = files.length > 1 ? `${files.length} files were dropped: this page took ${file.name} alone. fastden ui takes several.` : "";
  show("settings", true);
  run();
}

parts.file.addEventListener("change", () => {
  take([...parts.file.files]);
  parts.file.value = "";
});
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  parts.drop.addEventListener(name, (event) => {
    event.preventDefault();
    parts.drop.classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop") take([...event.dataTransfer.files]);
  });
}
parts.cancel.addEventListener("click", () => {
  stop();
  say("Cancelled.");
});
parts.again.addEventListener("click", run);
parts.auto.addEventListener("change", () => { parts.sigma.disabled = parts.auto.checked; });
for (const name of ["strength", "sigma"]) {
  parts[name].addEventListener("input", () => {
    parts[name].nextElementSibling.textContent = Number(parts[name].value).toFixed(name === "sigma" ? 1 : 2);
  });
}

fetch(new URL("./models/photo.onnx", import.meta.url), { method: "HEAD" })
  .then((answer) => {
    if (!answer.ok) throw new Error();
    parts.file.disabled = false;
    say("");
  })
  .catch(() => {
    const served = location.protocol.startsWith("http");
    say(
      served
        ? "This copy of the pages was built without the network: make docs, with npm installed, includes it."
        : "A browser runs the network only in pages from a web server: python -m http.server in this folder is one.",
      true,
    );
  });
