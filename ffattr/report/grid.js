/* The map on its canvas: where it is looked at, what is drawn, and the pointer on it. */

const stage = byId("stage");
const canvases = { map: byId("map"), over: byId("over"), mini: byId("mini") };
const LABEL = 11; /* pixels of a row from which on its token is written beside it */
const LARGEST = 56; /* pixels of a cell that is not zoomed */
const MINI = 112;

let shown = null; /* what `measure` returned for the maps drawn */
let picture = null;
const view = { left: 0, top: 0, width: 0, height: 0, x: 0, y: 0, sx: 1, sy: 1, fitted: true };

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rows = () => panel().queries.length;
const columns = () => panel().keys.length;
const toX = (column) => view.left + (column - view.x) * view.sx;
const toY = (row) => view.top + (row - view.y) * view.sy;

/* Cells are squares, unless one side has so many more tokens that its cells would vanish. */
function fitted() {
  let [sx, sy] = [view.width / columns(), view.height / rows()];
  if (Math.max(rows() / columns(), columns() / rows()) <= 3) sx = sy = Math.min(sx, sy);
  return [Math.min(sx, LARGEST), Math.min(sy, LARGEST)];
}

function fit() {
  [view.sx, view.sy] = fitted();
  view.x = view.y = 0;
  view.fitted = true;
}

function layOut() {
  const width = stage.clientWidth;
  if (!width) return; /* there is no map */
  const most = Number.parseFloat(getComputedStyle(stage).maxHeight) || width;
  const pen = canvases.map.getContext("2d");
  pen.font = `12px ${css("--sans")}`;
  /* Where tokens are written only after zooming in, they get less room. */
  const needed = (of) => {
    if (of.labels.length * LABEL > Math.max(width, most)) return Math.min(72, width * 0.16);
    return clamp(Math.max(...of.labels.map((label) => pen.measureText(label).width)) + 14, 40, Math.min(112, width * 0.2));
  };
  view.left = Math.round(needed(rowsAxis()));
  view.top = Math.round(needed(columnsAxis()));
  view.width = Math.max(width - view.left - 1, 10);
  view.height = Math.max(most - view.top - 1, 10);
  const height = Math.ceil(Math.min(most, Math.max(view.top + fitted()[1] * rows() + 2, 180)));
  view.height = height - view.top - 1;
  stage.style.height = `${height}px`;
  const ratio = devicePixelRatio || 1;
  for (const canvas of [canvases.map, canvases.over]) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  if (view.fitted) fit();
  else settle();
}

/* Keeps the map in sight: no further away than all of it, and no empty space where there is more of it. */
function settle() {
  const [sx, sy] = fitted();
  const shrink = Math.max(sx / view.sx, sy / view.sy);
  if (shrink >= 1) return fit();
  view.x = clamp(view.x, 0, Math.max(columns() - view.width / view.sx, 0));
  view.y = clamp(view.y, 0, Math.max(rows() - view.height / view.sy, 0));
  return undefined;
}

function zoom(factor, px = view.left + view.width / 2, py = view.top + view.height / 2) {
  const most = Math.max(72 / Math.max(view.sx, view.sy), 1);
  const by = Math.min(factor, most);
  const [x, y] = [view.x + (px - view.left) / view.sx, view.y + (py - view.top) / view.sy];
  view.sx *= by;
  view.sy *= by;
  view.x = x - (px - view.left) / view.sx;
  view.y = y - (py - view.top) / view.sy;
  view.fitted = false;
  settle();
  draw();
}

function pan(dx, dy) {
  view.x -= dx / view.sx;
  view.y -= dy / view.sy;
  settle();
  draw();
}

/* Scrolls so that a cell is in sight. */
function reveal(row, column) {
  const [wide, high] = [view.width / view.sx, view.height / view.sy];
  if (column !== NONE && (column < view.x || column + 1 > view.x + wide)) view.x = column + 0.5 - wide / 2;
  if (row !== NONE && (row < view.y || row + 1 > view.y + high)) view.y = row + 0.5 - high / 2;
  settle();
  draw();
}

let frame = 0;
function draw() {
  frame ||= requestAnimationFrame(drawNow);
}

function penOf(canvas) {
  const ratio = devicePixelRatio || 1;
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  return pen;
}

/* First and last visible row and column, and the part of the canvas that they take. */
function inSight() {
  const columnEnd = Math.min(columns(), Math.ceil(view.x + view.width / view.sx));
  const rowEnd = Math.min(rows(), Math.ceil(view.y + view.height / view.sy));
  const right = Math.min(toX(columns()), view.left + view.width);
  const bottom = Math.min(toY(rows()), view.top + view.height);
  return { row: Math.floor(view.y), rowEnd, column: Math.floor(view.x), columnEnd, right, bottom };
}

function drawNow() {
  frame = 0;
  if (!picture) return;
  const pen = penOf(canvases.map);
  const part = inSight();
  pen.save();
  pen.beginPath();
  pen.rect(view.left, view.top, part.right - view.left, part.bottom - view.top);
  pen.clip();
  if (Math.min(view.sx, view.sy) >= 8) drawCells(pen, part);
  else drawTiles(pen);
  pen.restore();
  pen.strokeStyle = css("--line");
  pen.strokeRect(view.left - 0.5, view.top - 0.5, part.right - view.left + 1, part.bottom - view.top + 1);
  drawAxes(pen, part);
  drawOver();
  drawMini();
  stage.classList.toggle("zoomed", !view.fitted);
  byId("fit").disabled = view.fitted;
}

function drawCells(pen, { row, rowEnd, column, columnEnd }) {
  const gap = Math.min(view.sx, view.sy) >= 14 ? 1 : 0;
  const numbers = view.sx >= 50 && view.sy >= 20;
  pen.font = `11px ${css("--sans")}`;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  for (let i = row; i < rowEnd; i++) {
    const [top, bottom] = [Math.round(toY(i)), Math.round(toY(i + 1))];
    for (let j = column; j < columnEnd; j++) {
      const [left, right] = [Math.round(toX(j)), Math.round(toX(j + 1))];
      const level = picture.level(i, j);
      pen.fillStyle = picture.colours.css[level];
      pen.fillRect(left, top, right - left - gap, bottom - top - gap);
      if (!numbers) continue;
      const value = shown.value(i, j);
      const text = (shown.brief || shown.say)(value).replace(" points", "");
      pen.fillStyle = picture.colours.ink[level];
      pen.fillText(value === 0 && !shown.both ? "0" : text, (left + right) / 2, (top + bottom) / 2, right - left - 6);
    }
  }
}

function drawTiles(pen) {
  const ratio = devicePixelRatio || 1;
  const halvings = (size) => Math.max(0, Math.ceil(Math.log2(1 / (size * ratio)) - 0.01));
  const [down, across] = [halvings(view.sy), halvings(view.sx)];
  const [high, wide] = [TILE * 2 ** down, TILE * 2 ** across];
  const snap = (value) => Math.round(value * ratio) / ratio;
  pen.imageSmoothingEnabled = view.sx * 2 ** across * ratio < 3 && down + across > 0;
  for (let y = Math.floor(view.y / high); y * high < Math.min(rows(), view.y + view.height / view.sy); y++) {
    for (let x = Math.floor(view.x / wide); x * wide < Math.min(columns(), view.x + view.width / view.sx); x++) {
      const tile = picture.tile(down, across, y, x);
      const [left, top] = [snap(toX(x * wide)), snap(toY(y * high))];
      const right = snap(toX(x * wide + tile.width * 2 ** across));
      const bottom = snap(toY(y * high + tile.height * 2 ** down));
      pen.drawImage(tile, left, top, right - left, bottom - top);
    }
  }
}

/* A round number of tokens between two positions written on an axis. */
function spacing(size) {
  const least = 44 / size;
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].find((times) => times * power >= least) * power;
}

function drawAxes(pen, { row, rowEnd, column, columnEnd, right, bottom }) {
  const soft = css("--soft");
  pen.fillStyle = css("--ink");
  pen.textBaseline = "middle";
  const along = (size, first, last, of, write) => {
    const step = size >= LABEL ? 1 : Math.max(1, spacing(size));
    pen.font = `${step === 1 && size >= LABEL ? clamp(size * 0.85, 10, 12.5) : 10.5}px ${css("--sans")}`;
    pen.fillStyle = size >= LABEL ? css("--ink") : soft;
    for (let i = Math.ceil(first / step) * step; i < last; i += step) {
      write(i, size >= LABEL ? of.labels[i] : String(of.positions[i]));
    }
  };
  along(view.sy, row, rowEnd, rowsAxis(), (i, label) => {
    const y = toY(i + 0.5);
    if (y < view.top || y > bottom) return;
    pen.textAlign = "right";
    pen.fillText(shortened(pen, label, view.left - 12), view.left - 6, y);
  });
  along(view.sx, column, columnEnd, columnsAxis(), (j, label) => {
    const x = toX(j + 0.5);
    if (x < view.left || x > right) return;
    columnLabel(pen, shortened(pen, label, view.top - 12), x);
  });
}

function columnLabel(pen, label, x) {
  pen.save();
  pen.translate(x, view.top - 6);
  pen.rotate(-Math.PI / 2);
  pen.textAlign = "left";
  pen.fillText(label, 0, 0);
  pen.restore();
}

function shortened(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  const characters = Array.from(text).slice(0, 40);
  while (characters.length > 1 && pen.measureText(`${characters.join("")}…`).width > width) characters.pop();
  return `${characters.join("")}…`;
}

/* What changes with the pointer: row and column, names of their tokens, and the cell that is kept. */
function drawOver() {
  const pen = penOf(canvases.over);
  if (!picture) return;
  mark(pen, hover.row, hover.column, css("--accent"), 1);
  mark(pen, state.row, state.column, css("--select"), 2);
}

function mark(pen, row, column, colour, width) {
  const { right, bottom } = inSight();
  const [left, top] = [toX(column), toY(row)];
  const inX = column !== NONE && left + view.sx > view.left && left < right;
  const inY = row !== NONE && top + view.sy > view.top && top < bottom;
  const [wide, high] = [Math.max(view.sx, 2), Math.max(view.sy, 2)];
  pen.save();
  pen.beginPath();
  pen.rect(view.left - 2, view.top - 2, right - view.left + 4, bottom - view.top + 4);
  pen.clip();
  pen.strokeStyle = pen.fillStyle = colour;
  pen.lineWidth = width;
  pen.globalAlpha = 0.8;
  if (inY) pen.strokeRect(view.left, top - 0.5, right - view.left, high);
  if (inX) pen.strokeRect(left - 0.5, view.top, wide, bottom - view.top);
  pen.globalAlpha = 1;
  if (inX && inY) {
    pen.lineWidth = width + 1;
    pen.strokeRect(left - 1, top - 1, wide + 1, high + 1);
  }
  pen.restore();
  pen.font = `600 12px ${css("--sans")}`;
  pen.textBaseline = "middle";
  const chip = (label, most) => {
    const text = shortened(pen, label, most);
    const length = pen.measureText(text).width + 10;
    pen.fillStyle = colour;
    pen.beginPath();
    pen.roundRect(-length, -9, length, 18, 4);
    pen.fill();
    pen.fillStyle = css("--on-accent");
    pen.textAlign = "left";
    pen.fillText(text, 5 - length, 0.5);
  };
  if (inY) {
    pen.save();
    pen.translate(view.left - 2, clamp(top + high / 2, view.top + 9, bottom));
    chip(rowsAxis().labels[row], view.left - 14);
    pen.restore();
  }
  if (inX) {
    pen.save();
    const x = clamp(left + wide / 2, view.left + 9, right);
    pen.translate(x, view.top - 2);
    pen.rotate(-Math.PI / 2);
    const text = shortened(pen, columnsAxis().labels[column], view.top - 14);
    pen.translate(pen.measureText(text).width + 10, 0);
    chip(text, view.top);
    pen.restore();
  }
}

function drawMini() {
  const { mini } = canvases;
  mini.hidden = view.fitted || Math.max(rows(), columns()) < 24;
  if (mini.hidden) return;
  const ratio = devicePixelRatio || 1;
  const scale = MINI / Math.max(rows(), columns());
  const [width, height] = [Math.max(columns() * scale, 12), Math.max(rows() * scale, 12)];
  mini.width = width * ratio;
  mini.height = height * ratio;
  mini.style.width = `${width}px`;
  mini.style.height = `${height}px`;
  const pen = penOf(mini);
  const halvings = (count, size) => Math.max(0, Math.ceil(Math.log2(count / (size * ratio))));
  const [down, across] = [halvings(rows(), height), halvings(columns(), width)];
  pen.imageSmoothingEnabled = down + across > 0;
  const small = picture.smaller(down, across);
  for (let y = 0; y * TILE < small.rows; y++) {
    for (let x = 0; x * TILE < small.columns; x++) {
      const tile = picture.tile(down, across, y, x);
      const [sx, sy] = [width / small.columns, height / small.rows];
      pen.drawImage(tile, x * TILE * sx, y * TILE * sy, tile.width * sx, tile.height * sy);
    }
  }
  pen.strokeStyle = css("--select");
  pen.lineWidth = 2;
  const [sx, sy] = [width / columns(), height / rows()];
  const [wide, high] = [Math.min(view.width / view.sx, columns()) * sx, Math.min(view.height / view.sy, rows()) * sy];
  pen.strokeRect(clamp(view.x * sx, 1, width - 3), clamp(view.y * sy, 1, height - 3), Math.max(wide - 2, 3), Math.max(high - 2, 3));
}
