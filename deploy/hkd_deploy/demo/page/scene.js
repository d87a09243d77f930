// Lines and zones: drawing, counts as text, and the editor. Points are fractions of the width and height of the image.

const LINE_COLOR = "#ffd60a";
const ZONE_COLOR = "#4cc2ff";
const DRAFT_COLOR = "#ff7ad9";
const MIN_DRAG = 0.03; // a shorter movement is a tap

export function formatCounts(counts) {
  const format = (value) =>
    value !== null && typeof value === "object"
      ? Object.entries(value).map(([key, item]) => `${key.replaceAll("_", " ")} ${format(item)}`).join(", ")
      : `${value}`;
  const rows = [];
  for (const [group, values] of Object.entries(counts)) {
    if (["lines", "zones"].includes(group)) {
      for (const [name, value] of Object.entries(values)) rows.push([name, formatZone(value) ?? format(value)]);
    } else rows.push([group.replaceAll("_", " "), format(values)]);
  }
  return rows;
}

function formatZone(zone) {
  if (zone.entries === undefined) return null;
  const parts = [`${zone.persons} now, ${zone.entries} in, ${zone.exits} out`];
  if (zone.exits) parts.push(`stay ${zone.mean_dwell_s.toFixed(1)} s`);
  parts.push(`last minute: mean ${zone.mean_persons_60s.toFixed(1)}, maximum ${zone.max_persons_60s}`);
  return parts.join("; ");
}

export function drawShapes(context, shapes, counts, scale, editor) {
  for (const [name, points] of Object.entries(shapes.zones)) {
    drawZone(context, points, ZONE_COLOR, scale);
    const persons = counts?.zones?.[name]?.persons;
    const corner = points.reduce((top, point) => (point[1] < top[1] ? point : top));
    drawLabel(context, corner, persons === undefined ? name : `${name}: ${persons}`, ZONE_COLOR, scale);
  }
  for (const [name, points] of Object.entries(shapes.lines)) {
    drawLine(context, points, LINE_COLOR, scale);
    const sides = counts?.lines?.[name];
    const label = sides ? `${name}: ${sides.left} left, ${sides.right} right` : name;
    drawLabel(context, points[0], label, LINE_COLOR, scale);
  }
  if (editor.points.length) {
    if (editor.mode === "line" && editor.points.length === 2) drawLine(context, editor.points, DRAFT_COLOR, scale);
    else drawZone(context, editor.points, DRAFT_COLOR, scale);
    for (const point of editor.points) drawDot(context, point, DRAFT_COLOR, scale);
  }
}

function toPixels(context, point) {
  return [point[0] * context.canvas.width, point[1] * context.canvas.height];
}

function tracePath(context, points, isClosed) {
  context.beginPath();
  points.forEach((point, index) => context[index ? "lineTo" : "moveTo"](...toPixels(context, point)));
  if (isClosed) context.closePath();
}

function strokePath(context, color, scale) {
  for (const [stroke, width] of [["#0009", 5], [color, 2.5]]) {
    context.strokeStyle = stroke;
    context.lineWidth = width * scale;
    context.stroke();
  }
}

function drawZone(context, points, color, scale) {
  tracePath(context, points, true);
  context.fillStyle = `${color}26`;
  context.fill();
  strokePath(context, color, scale);
}

function drawLine(context, points, color, scale) {
  tracePath(context, points, false);
  strokePath(context, color, scale);
  drawDot(context, points[0], color, scale);
  const [[x1, y1], [x2, y2]] = points.map((point) => toPixels(context, point));
  const length = Math.hypot(x2 - x1, y2 - y1) || 1;
  const [normalX, normalY] = [-(y2 - y1) / length, (x2 - x1) / length]; // to the right, seen from the first point
  const [x, y] = [x1 + 0.75 * (x2 - x1), y1 + 0.75 * (y2 - y1)];
  for (const [side, text] of [[-14, "L"], [14, "R"]]) {
    drawText(context, [x + side * scale * normalX, y + side * scale * normalY], text, color, scale);
  }
}

function drawDot(context, point, color, scale) {
  context.beginPath();
  context.arc(...toPixels(context, point), 5 * scale, 0, 2 * Math.PI);
  context.fillStyle = color;
  context.fill();
}

function drawText(context, [x, y], text, color, scale, align = "center") {
  context.font = `600 ${12 * scale}px system-ui, sans-serif`;
  [context.textAlign, context.textBaseline] = [align, "middle"];
  context.lineWidth = 3 * scale;
  context.strokeStyle = "#000c";
  context.strokeText(text, x, y);
  context.fillStyle = color;
  context.fillText(text, x, y);
  [context.textAlign, context.textBaseline] = ["start", "alphabetic"];
}

function drawLabel(context, point, text, color, scale) {
  const [x, y] = toPixels(context, point);
  const top = y > 20 * scale ? y - 12 * scale : y + 12 * scale;
  drawText(context, [x, top], text, color, scale, point[0] < 0.5 ? "left" : "right");
}

export class Editor {
  constructor(camera, onChange) {
    this.camera = camera;
    this.onChange = onChange;
    this.isOpen = false;
    this.mode = null; // "line" or "zone" while one is drawn
    this.points = [];
    this.shapes = { lines: {}, zones: {} };
    this.isDragging = false;
    const on = (selector, action) => camera.find(selector).addEventListener("click", action);
    on(".edit", () => this.open());
    on(".add-line", () => this.begin("line"));
    on(".add-zone", () => this.begin("zone"));
    on(".undo", () => this.undo());
    on(".finish", () => this.askName());
    on(".accept", () => this.accept());
    on(".save", () => this.save());
    on(".cancel", () => this.close(""));
    camera.find(".naming input").addEventListener("keydown", (event) => event.key === "Enter" && this.accept());
    const canvas = camera.find(".image");
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.release(event));
    canvas.addEventListener("pointercancel", () => this.undo());
  }

  open() {
    this.shapes = structuredClone({ lines: this.camera.state.lines, zones: this.camera.state.zones });
    this.isOpen = true;
    this.stop();
    this.showMessage("", false);
  }

  close(message) {
    this.isOpen = false;
    this.stop();
    this.showMessage(message, false);
  }

  begin(mode) {
    this.stop();
    this.mode = mode;
    this.refresh();
    this.camera.canvas.scrollIntoView({ block: "nearest" });
  }

  stop() {
    [this.mode, this.points, this.isDragging, this.isNaming] = [null, [], false, false];
    this.refresh();
  }

  getPoint(event) {
    const canvas = this.camera.canvas;
    const box = canvas.getBoundingClientRect();
    const scale = Math.min(box.width / canvas.width, box.height / canvas.height); // object-fit: contain
    const [width, height] = [canvas.width * scale, canvas.height * scale];
    const x = (event.clientX - box.left - (box.width - width) / 2) / width;
    const y = (event.clientY - box.top - (box.height - height) / 2) / height;
    return [x, y].map((value) => Math.min(1, Math.max(0, value)));
  }

  press(event) {
    if (!this.mode || this.isNaming || event.button > 0) return;
    event.preventDefault();
    this.camera.canvas.setPointerCapture(event.pointerId);
    this.points.push(this.getPoint(event));
    this.isDragging = true;
    this.refresh();
  }

  move(event) {
    if (!this.isDragging) return;
    const point = this.getPoint(event);
    if (this.mode === "line" && this.points.length === 1) {
      if (this.isFar(point, this.points[0])) this.points.push(point);
    } else this.points[this.points.length - 1] = point;
    this.onChange();
  }

  release() {
    if (!this.isDragging) return;
    this.isDragging = false;
    if (this.mode === "line" && this.points.length === 2) {
      if (this.isFar(...this.points)) this.askName();
      else this.points.pop();
    }
    this.refresh();
  }

  isFar(first, second) {
    return Math.hypot(first[0] - second[0], first[1] - second[1]) > MIN_DRAG;
  }

  undo() {
    this.points.pop();
    [this.isDragging, this.isNaming] = [false, false];
    this.refresh();
  }

  askName() {
    const taken = { ...this.shapes.lines, ...this.shapes.zones };
    let number = 1;
    while (`${this.mode} ${number}` in taken) number++;
    const input = this.camera.find(".naming input");
    input.value = `${this.mode} ${number}`;
    this.isNaming = true;
    this.refresh();
    input.focus({ preventScroll: true });
    input.select();
  }

  accept() {
    const name = this.camera.find(".naming input").value.trim();
    if (!this.isNaming || !name) return;
    this.shapes[`${this.mode}s`][name] = this.points;
    this.stop();
    this.showMessage("Not saved yet.", false);
  }

  async save() {
    const button = this.camera.find(".save");
    button.disabled = true;
    try {
      const response = await fetch(`cameras/${this.camera.index}/scene`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(this.shapes),
      });
      const result = await response.json();
      if (!response.ok) throw new Error(result.error);
      Object.assign(this.camera.state, this.shapes);
      this.close(result.is_active ? "Saved and in effect." : "Saved. Counting begins after a restart of hkd-demo.");
    } catch (error) {
      this.showMessage(`Not saved: ${error.message}`, true);
    }
    button.disabled = false;
  }

  showMessage(text, isBad) {
    const message = this.camera.find(".message");
    message.textContent = text;
    message.classList.toggle("bad", isBad);
  }

  refresh() {
    const { find, root } = this.camera;
    const hints = { line: "Drag from one end to the other, or tap both ends.", zone: "Tap the corners, at least three." };
    root.classList.toggle("drawing", this.mode !== null);
    root.classList.toggle("editing", this.isOpen); // the image and the buttons fit on a phone
    find(".edit").hidden = this.isOpen;
    find(".panel").hidden = !this.isOpen;
    find(".undo").hidden = !this.points.length;
    find(".finish").hidden = this.mode !== "zone" || this.points.length < 3 || this.isNaming;
    find(".naming").hidden = !this.isNaming;
    find(".hint").textContent = this.mode && !this.isNaming ? hints[this.mode] : "";
    find(".shapes").replaceChildren(...["lines", "zones"].flatMap((group) => this.listShapes(group)));
    this.onChange();
  }

  listShapes(group) {
    return Object.keys(this.shapes[group]).map((name) => {
      const item = document.createElement("li");
      const label = Object.assign(document.createElement("span"), { textContent: `${group.slice(0, -1)}: ${name}` });
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: "Remove" });
      button.addEventListener("click", () => {
        delete this.shapes[group][name];
        this.showMessage("Not saved yet.", false);
        this.refresh();
      });
      item.append(label, button);
      return item;
    });
  }
}
