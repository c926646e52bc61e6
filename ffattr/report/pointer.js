/* Pointer and wheel on the map and on its small copy. */

function cellAt(event) {
  const box = canvases.over.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const column = Math.floor(view.x + (x - view.left) / view.sx);
  const row = Math.floor(view.y + (y - view.top) / view.sy);
  return {
    x, y,
    row: y >= view.top ? within(row, rows()) : NONE,
    column: x >= view.left ? within(column, columns()) : NONE,
  };
}

/* A cell, or where the pointer is on a token beside the map, that token. */
function select({ row, column }) {
  if (row === NONE && column === NONE) return;
  change({
    row: row !== NONE ? row : panel().same ? rowOfColumn(column) : state.row,
    column: column !== NONE ? column : panel().same ? columnOfRow(row) : state.column,
  });
}

function watchPointer() {
  const { over, mini } = canvases;
  const pointers = new Map();
  let moved = 0;
  const apart = () => {
    const [a, b] = [...pointers.values()];
    return { distance: Math.hypot(a.x - b.x, a.y - b.y) || 1, x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 };
  };
  over.addEventListener("pointerdown", (event) => {
    over.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, cellAt(event));
    moved = pointers.size > 1 ? Infinity : 0;
  });
  over.addEventListener("pointermove", (event) => {
    const at = cellAt(event);
    const last = pointers.get(event.pointerId);
    if (!last) return point(at);
    const before = pointers.size === 2 ? apart() : null;
    pointers.set(event.pointerId, at);
    moved += Math.hypot(at.x - last.x, at.y - last.y);
    if (before) {
      const now = apart();
      pan(now.x - before.x, now.y - before.y);
      zoom(now.distance / before.distance, now.x, now.y);
    } else if (moved > 4 && !view.fitted) {
      pan(at.x - last.x, at.y - last.y);
      over.classList.add("dragged");
    }
    return undefined;
  });
  over.addEventListener("pointerup", (event) => {
    if (pointers.delete(event.pointerId) && moved <= 4) select(cellAt(event));
    over.classList.remove("dragged");
  });
  over.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
  over.addEventListener("pointerleave", () => point({ row: NONE, column: NONE }));
  over.addEventListener("dblclick", showAll);
  over.addEventListener("wheel", (event) => {
    event.preventDefault();
    const { x, y } = cellAt(event);
    const lines = event.deltaMode === 1 ? 16 : 1;
    zoom(Math.exp(-clamp(event.deltaY * lines, -240, 240) / 300), Math.max(x, view.left), Math.max(y, view.top));
  }, { passive: false });

  const jump = (event) => {
    if (!event.buttons) return;
    const box = mini.getBoundingClientRect();
    view.x = ((event.clientX - box.left) / box.width) * columns() - view.width / view.sx / 2;
    view.y = ((event.clientY - box.top) / box.height) * rows() - view.height / view.sy / 2;
    settle();
    draw();
  };
  mini.addEventListener("pointerdown", (event) => {
    mini.setPointerCapture(event.pointerId);
    jump(event);
  });
  mini.addEventListener("pointermove", jump);
}

function showAll() {
  fit();
  draw();
}

/* The pointer is on this cell now. */
function point({ row, column }) {
  if (row === hover.row && column === hover.column) return;
  Object.assign(hover, { row, column });
  drawOver();
  readOut();
  if (state.row === NONE && state.column === NONE && Math.max(rows(), columns()) <= 512) shade();
}
