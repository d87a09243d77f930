// Live images, statistics and plots of all cameras.

import { Editor, drawShapes, formatCounts } from "./scene.js";

const MIN_FRAME_INTERVAL_MS = 80; // between two requests for frames
const STATE_INTERVAL_MS = 1000;
const [MIN_PLOT_S, MAX_PLOT_S] = [60, 600];
const BOX_COLOR = "#26d094";
const cameras = [];
let serverTime = 0;

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

class Camera {
  constructor(index) {
    this.index = index;
    this.state = { lines: {}, zones: {} };
    this.history = new Map();
    this.frame = null;
    this.bitmap = null;
    this.isVisible = true;
    const root = document.getElementById("camera").content.cloneNode(true).firstElementChild;
    this.root = root;
    this.find = (selector) => root.querySelector(selector);
    this.canvas = this.find(".image");
    this.editor = new Editor(this, () => this.draw());
    document.getElementById("cameras").append(root);
    observer.observe(this.canvas);
    this.canvas.parentElement.dataset.camera = index;
  }

  get seq() {
    return this.frame ? this.frame.seq : 0;
  }

  async showFrame(frame, jpeg) {
    const bitmap = await createImageBitmap(new Blob([jpeg], { type: "image/jpeg" }));
    this.bitmap?.close();
    [this.bitmap, this.frame] = [bitmap, frame];
    if (this.canvas.width !== bitmap.width || this.canvas.height !== bitmap.height) {
      [this.canvas.width, this.canvas.height] = [bitmap.width, bitmap.height];
    }
    this.root.dataset.seq = frame.seq;
    this.draw();
  }

  draw() {
    const context = this.canvas.getContext("2d");
    const { width, height } = this.canvas;
    if (this.bitmap) context.drawImage(this.bitmap, 0, 0);
    else context.clearRect(0, 0, width, height);
    const scale = width / (this.canvas.clientWidth || width); // of a CSS pixel
    const shapes = this.editor.isOpen ? this.editor.shapes : this.state;
    if (this.frame && !this.state.is_down) drawBoxes(context, this.frame, scale);
    drawShapes(context, shapes, this.state.counts, scale, this.editor);
  }

  update(state, canSave) {
    this.state = state;
    this.root.hidden = state.is_removed;
    this.find("h2").textContent = state.name;
    this.canvas.setAttribute("aria-label", `image of ${state.name}`);
    this.find(".state").textContent = nameState(state);
    this.find(".state").className = `state ${state.is_down ? "down" : state.status ? "warn" : ""}`;
    this.root.classList.toggle("down", state.is_down);
    this.find(".warning").textContent = state.status;
    this.find(".warning").hidden = !state.status || state.status === "opening";
    const isRunning = state.persons !== undefined && !state.is_down;
    this.find(".persons").textContent = isRunning ? state.persons : "–";
    this.find(".fps").textContent = isRunning ? state.fps.toFixed(1) : "–";
    this.find(".age").textContent = isRunning && state.age_ms !== null ? formatMs(state.age_ms) : "–";
    this.find(".drift").hidden = !state.drift;
    this.find(".drift").classList.toggle("bad", state.drift?.state === "drift");
    this.find(".drift dd").textContent = { drift: "yes", ok: "no" }[state.drift?.state] ?? "–";
    fillTable(this.find(".details tbody"), listDetails(state));
    const counts = formatCounts(state.counts ?? {});
    fillTable(this.find(".counts tbody"), counts);
    this.find(".counts").hidden = counts.length === 0;
    this.find(".editor").hidden = !canSave;
    for (const [second, persons] of state.history) this.history.set(second, persons);
    for (const second of this.history.keys()) if (second < serverTime - MAX_PLOT_S) this.history.delete(second);
    drawPlot(this.find(".plot"), this.history);
    this.draw();
  }
}

function nameState({ status, is_down: isDown }) {
  if (status === "opening" || !status) return status || "live";
  if (status.startsWith("ended")) return "ended";
  return isDown ? "lost" : "problem";
}

function listDetails(state) {
  const rows = [["frames", state.num_frames], ["dropped", state.num_dropped], ["losses", state.num_lost]];
  if (state.age_percentiles_ms.length) rows.push(["age p50 / p99", state.age_percentiles_ms.map(formatMs).join(" / ")]);
  for (const [stage, ms] of Object.entries(state.stages_ms ?? {})) rows.push([stage, `${ms.toFixed(1)} ms`]);
  for (const [name, { psi, threshold }] of Object.entries(state.drift?.quantities ?? {})) {
    rows.push([`drift of ${name}`, psi === null ? "too few values" : `PSI ${psi.toFixed(2)}, limit ${threshold.toFixed(2)}`]);
  }
  if (state.drift?.state === "waiting") rows.push(["drift", "not compared yet"]);
  if (state.model) rows.push(["model", state.model]);
  return rows;
}

function formatMs(ms) {
  return Math.abs(ms) < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

function fillTable(body, rows) {
  body.replaceChildren(
    ...rows.map((cells) => {
      const row = document.createElement("tr");
      row.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
      return row;
    }),
  );
}

function drawBoxes(context, frame, scale) {
  const { width, height } = context.canvas;
  context.font = `${12 * scale}px system-ui, sans-serif`;
  context.textBaseline = "alphabetic";
  for (let i = frame.boxes.length - 1; i >= 0; i--) {
    const [x1, y1, x2, y2] = frame.boxes[i];
    const box = [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height];
    for (const [color, line] of [["#101010", 4], [BOX_COLOR, 2]]) {
      context.strokeStyle = color;
      context.lineWidth = line * scale;
      context.strokeRect(...box);
    }
    const id = frame.ids ? frame.ids[i] : -1;
    const label = id >= 0 ? `${id}` : frame.scores[i].toFixed(2);
    const labelWidth = context.measureText(label).width + 6 * scale;
    if (box[2] < 0.6 * labelWidth) continue; // labels would hide small persons in a crowd
    const top = Math.max(0, box[1] - 16 * scale);
    context.fillStyle = BOX_COLOR;
    context.fillRect(box[0] - scale, top, labelWidth, 16 * scale);
    context.fillStyle = "#101010";
    context.fillText(label, box[0] + 2 * scale, top + 12 * scale);
  }
}

function drawPlot(canvas, history) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  [canvas.width, canvas.height] = [width * ratio, height * ratio];
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const top = Math.max(1, Math.ceil(Math.max(0, ...history.values())));
  const [left, bottom] = [26, height - 16];
  const span = Math.min(MAX_PLOT_S, Math.max(MIN_PLOT_S, serverTime - Math.min(serverTime, ...history.keys())));
  const toX = (second) => left + ((second - serverTime + span) / span) * (width - left);
  const toY = (persons) => bottom - (persons / top) * (bottom - 8);
  context.font = "11px system-ui, sans-serif";
  context.fillStyle = style.getPropertyValue("--soft");
  context.strokeStyle = style.getPropertyValue("--line");
  context.lineWidth = 1;
  for (const persons of [0, top]) {
    context.beginPath();
    context.moveTo(left, toY(persons) + 0.5);
    context.lineTo(width, toY(persons) + 0.5);
    context.stroke();
    context.textAlign = "right";
    context.fillText(persons, left - 6, toY(persons) + 4);
  }
  for (const [seconds, align] of [[span, "left"], [span / 2, "center"], [0, "right"]]) {
    context.textAlign = align;
    const time = seconds < 120 ? `${Math.round(seconds)} s` : `${(seconds / 60).toFixed(1).replace(".0", "")} min`;
    context.fillText(seconds ? `−${time}` : "now", toX(serverTime - seconds), height - 2);
  }
  context.strokeStyle = style.getPropertyValue("--accent");
  context.lineWidth = 1.5;
  context.beginPath();
  let previous = -Infinity;
  for (const [second, persons] of [...history].sort((a, b) => a[0] - b[0])) {
    const isGap = second - previous > 3; // the camera was lost
    if (isGap) context.moveTo(toX(second), toY(persons));
    context.lineTo(toX(second), toY(persons));
    context.lineTo(toX(second + 1), toY(persons));
    previous = second;
  }
  context.stroke();
}

// Only cameras on the screen are requested, and only while the page is visible.
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) cameras[entry.target.parentElement.dataset.camera].isVisible = entry.isIntersecting;
});

async function request(path) {
  const response = await fetch(path, { cache: "no-store" });
  if (!response.ok) throw new Error(response.status === 401 ? "The token is not valid any more. Open the address that hkd-demo printed." : `The server returned ${response.status}.`);
  return response;
}

async function updateFrames() {
  for (;;) {
    const shown = cameras.filter((camera) => camera.isVisible);
    if (document.hidden || !shown.length) {
      await sleep(200);
      continue;
    }
    const start = performance.now();
    try {
      const after = shown.map((camera) => `${camera.index}:${camera.seq}`).join(",");
      await showFrames(await (await request(`frames?after=${after}`)).arrayBuffer());
      await sleep(Math.max(0, MIN_FRAME_INTERVAL_MS - (performance.now() - start)));
    } catch {
      await sleep(1000); // the state shows the problem
    }
  }
}

async function showFrames(buffer) {
  const length = new DataView(buffer).getUint32(0);
  const frames = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let offset = 4 + length;
  for (const frame of frames) {
    await cameras[frame.camera].showFrame(frame, buffer.slice(offset, offset + frame.bytes));
    offset += frame.bytes;
  }
}

async function updateState() {
  let since = 0;
  for (;;) {
    const notice = document.getElementById("notice");
    try {
      const state = await (await request(`state?since=${since}`)).json();
      serverTime = state.time;
      since = state.time - 1; // the last second was not complete
      state.cameras.forEach((camera, index) => {
        cameras[index] ??= new Camera(index);
        cameras[index].update(camera, state.can_save);
      });
      showSummary(state);
      notice.hidden = true;
    } catch (error) {
      notice.textContent = error instanceof TypeError ? "hkd-demo does not respond. Trying again." : error.message;
      notice.hidden = false;
    }
    await sleep(STATE_INTERVAL_MS);
  }
}

function showSummary(state) {
  const shown = state.cameras.filter((camera) => !camera.is_removed);
  const total = shown.reduce((sum, camera) => sum + (camera.is_down ? 0 : camera.persons ?? 0), 0);
  const numDown = shown.filter((camera) => camera.is_down).length;
  const parts = [`${shown.length} camera${shown.length > 1 ? "s" : ""}`];
  if (numDown) parts.push(`${numDown} lost`);
  parts.push(`${total} person${total === 1 ? "" : "s"}`);
  if (state.temperature_c !== null) parts.push(`${state.temperature_c.toFixed(0)} °C`);
  if (state.power_w !== null) parts.push(`${state.power_w.toFixed(1)} W`);
  document.getElementById("summary").textContent = parts.join(" · ");
  document.getElementById("cameras").classList.toggle("single", shown.length === 1);
}

updateState();
updateFrames();
