// Makes parts of the page. What comes from the server becomes text, never markup.

import { NONE } from "./words.js";

export const byId = (id) => document.getElementById(id);

/** Return an element; children are nodes or strings, and strings become text. */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const note = (text, look = "") => element("span", { class: `note ${look}`.trim() }, text);

const drawn = new Map();

/** Draw a part of the page, and only when its data has changed: selections and focus survive. */
export function draw(id, data, children) {
  const key = JSON.stringify(data);
  if (drawn.get(id) === key) return;
  drawn.set(id, key);
  const node = byId(id);
  node.replaceChildren(...children());
  node.hidden = !node.hasChildNodes();
}

/** Return a table. A column is [heading, class]; a cell is a node, a string, or a list of both. */
export function table(columns, rows) {
  const head = columns.map(([label, look]) => element("th", { scope: "col", class: look }, label));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell, place) => tableCell(cell, columns[place], place))));
  return element("table", {},
    element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
}

function tableCell(cell, [label, look], place) {
  const children = Array.isArray(cell) ? cell : [cell];
  if (place === 0) return element("th", { scope: "row" }, ...children);
  return element("td", { class: cell === NONE ? `${look} none` : look, "data-label": label }, ...children);
}

/** Return buttons that turn pages, or nothing where there is one page. `turn` gets the new page, from 0 on. */
export function pager(what, page, numPages, turn) {
  if (numPages < 2) return [];
  const button = (text, to) => {
    const node = element("button", { type: "button", "aria-label": `${text} page of ${what}` }, text);
    node.disabled = to < 0 || to >= numPages;
    node.addEventListener("click", () => turn(to));
    return node;
  };
  return [element("nav", { class: "pager", "aria-label": `Pages of ${what}` },
    button("Previous", page - 1),
    element("span", { class: "soft" }, `page ${page + 1} of ${numPages}`),
    button("Next", page + 1))];
}
