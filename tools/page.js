"use strict";
// Everything that models or users wrote reaches the page through textContent, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SIGNS = { "\n": "⏎", "\t": "⇥", "\r": "␍" };
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b\u200c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]/;

function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const fixed = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−"));
function norm(value) {
  if (value === null) return "–";
  if (value < 0.01 || value >= 1e6) return value.toPrecision(3);
  return value.toFixed(value >= 1000 ? 0 : value >= 100 ? 1 : 2);
}
// How much colour a score gets. The exponent sets values of .5 to .9, where most scores lie, further apart.
const strength = (v) => (0.95 * Math.min(1, Math.abs(v)) ** 1.6).toFixed(3);
const code = (c) => "U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);

// -- what is explained: one item per token or row, with its samples ------------------------------------------------
const items = data.items.map((item) => {
  const of = (name) => mean(item.samples.map((s) => s[name]).filter((v) => v !== null));
  const scores = { cosine: of("cosine"), mse_nrm: of("mse_nrm"), fve_nrm: of("fve_nrm") };
  return { ...item, ...scores, failed: item.samples.some((s) => s.failed), value: data.metric ? scores[data.metric] : null };
});
const itemAt = new Map(items.map((item, i) => [item.at, i]));
const nodes = [];
let selected = -1;
let query = "";

function shown(text) {
  return [...text].map((c) => SIGNS[c] || (c === " " ? "␣" : INVISIBLE.test(c) ? code(c) : c)).join("");
}
function name(item) {
  if (data.mode === "rows") return "row " + item.at;
  const [, , , part, parts] = data.tokens[item.at];
  const first = data.tokens[item.at - part + 1][0];
  return shown(first) + (parts > 1 ? ` (${part}/${parts})` : "");
}

// -- header --------------------------------------------------------------------------------------------------------
for (const key of ["kicker", "title", "subtitle"]) byId(key).textContent = data[key];
for (const s of data.stats) {
  byId("stats").append(el("div", { class: s.poor ? "poor" : "" }, el("dt", {}, s.label), el("dd", {}, s.value, el("small", {}, s.note))));
}
for (const [label, value] of data.facts) byId("facts").append(el("dt", {}, label), el("dd", {}, value));

function legend() {
  const out = byId("legend");
  if (!data.metric) {
    out.append("Not scored: no AR was given.");
    return;
  }
  const ramp = el("span", { class: "ramp", role: "img", "aria-label": "colour scale" });
  const low = data.metric === "fve_nrm" ? -1 : 0;
  for (let k = 0; k < 24; k++) {
    const v = low + ((1 - low) * (k + 0.5)) / 24;
    const cell = el("i");
    cell.style.background = `rgb(var(--${v >= 0 ? "good" : "poor"}) / ${strength(v)})`;
    if (low < 0 && k === 12) ramp.append(el("i", { class: "zero" }));
    ramp.append(cell);
  }
  const scale = el("span", { class: "scale" }, low < 0 ? "≤ −1" : "0", ramp, "1");
  const meaning = data.metric === "fve_nrm"
    ? "1: direction fully recovered, 0: no better than the training mean"
    : "cosine of reconstruction and activation (fve_nrm needs the variance)";
  out.append(el("b", {}, data.metric), scale, el("span", {}, meaning));
  if (items.some((item) => item.failed)) out.append(el("span", {}, el("span", { class: "key failed" }, "abc"), " failed to parse"));
}

// -- the text ------------------------------------------------------------------------------------------------------
function fill(node, text, marked) {
  let plain = "";
  for (const c of text) {
    const sign = c === "\n" && marked ? "⏎" : c === "\r" ? (marked ? "␍" : "") : INVISIBLE.test(c) && c !== "\n" && c !== "\t" ? code(c) : null;
    if (sign === null) {
      plain += c;
      continue;
    }
    node.append(plain);
    plain = "";
    if (sign) node.append(el("span", { class: "sign", "aria-hidden": "true" }, sign));
    if (c === "\n") plain = "\n";
  }
  node.append(plain);
}
function tokenNode(position) {
  const [text, , special, part, parts] = data.tokens[position];
  const i = itemAt.get(position);
  const node = el("span", { class: "t" + (special ? " special" : "") });
  if (i === undefined) {
    fill(node, text, false);
    return [node];
  }
  // The space that a word's token begins with stays uncoloured: it would dangle at the ends of lines.
  const space = /^ (?=\S)/.test(text) ? " " : "";
  fill(node, text.slice(space.length), true);
  if (part > 1) node.append(el("span", { class: "piece" }, String(part)));
  else if (!text) node.append(el("span", { class: "sign" }, "∅"));
  dress(node, i);
  return [space, node];
}
function dress(node, i) {
  const item = items[i];
  node.classList.add("on");
  if (item.failed) node.classList.add("failed");
  if (item.value !== null) {
    node.classList.add(item.value < 0 ? "down" : "up");
    node.style.setProperty("--a", strength(item.value));
  }
  const score = data.metric ? `, ${data.metric} ${fixed(item.value)}` : "";
  const place = data.mode === "rows" ? "" : `, position ${item.at}`;
  node.dataset.i = i;
  node.title = `${name(item)}${place}${score}\n\n${item.samples[0].text.slice(0, 400)}`;
  node.setAttribute("role", "button");
  node.setAttribute("aria-pressed", "false");
  node.setAttribute("aria-label", `${name(item)}${place}${score}${item.failed ? ", failed" : ""}`);
  node.tabIndex = -1;
  nodes[i] = node;
}
function text() {
  const root = byId("text");
  if (data.mode === "rows") {
    const list = el("div", { class: "rows" });
    items.forEach((item, i) => {
      const node = el("span", { class: "t" }, String(item.at));
      dress(node, i);
      list.append(node);
    });
    root.append(list);
    return;
  }
  const fragment = document.createDocumentFragment();
  let position = 0;
  for (const [role, start, end] of data.messages) {
    for (; position < start; position++) fragment.append(...tokenNode(position));
    const section = el("section", { "aria-label": role }, el("h2", {}, role));
    for (; position < end; position++) section.append(...tokenNode(position));
    fragment.append(section);
  }
  for (; position < data.tokens.length; position++) fragment.append(...tokenNode(position));
  root.append(fragment);
}

// -- scores along the text -----------------------------------------------------------------------------------------
function strip() {
  const scored = items.filter((item) => item.value !== null);
  const total = data.mode === "rows" ? items.length : data.tokens.length;
  if (scored.length < 8) return;
  const svg = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };
  const floor = Math.max(-1, Math.min(0, ...scored.map((item) => item.value)));
  const x = (i) => (data.mode === "rows" ? i : items[i].at);
  const y = (v) => 4 + (92 * (1 - v)) / (1 - floor);
  const root = svg("svg", { viewBox: `0 0 ${total} 100`, preserveAspectRatio: "none", role: "img", "aria-label": `${data.metric} along the text` });
  if (data.mode !== "rows") root.append(svg("rect", { class: "early", x: 0, y: 0, width: Math.min(data.early, total), height: 100 }));
  items.forEach((item, i) => {
    if (item.value === null) return;
    const v = Math.max(floor, Math.min(1, item.value));
    root.append(svg("rect", { class: v < 0 ? "down" : "up", x: x(i) + 0.08, width: 0.84, y: Math.min(y(v), y(0)), height: Math.max(1, Math.abs(y(v) - y(0))) }));
  });
  root.append(svg("line", { class: "axis", x1: 0, x2: total, y1: y(0), y2: y(0) }));
  const here = svg("line", { class: "here", y1: 0, y2: 100 });
  root.append(here);
  strip.move = (i) => {
    for (const end of ["x1", "x2"]) here.setAttribute(end, x(i) + 0.5);
    here.classList.add("on");
  };
  root.addEventListener("click", (event) => {
    const box = root.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * total - 0.5;
    let best = 0;
    items.forEach((_, i) => { if (Math.abs(x(i) - at) < Math.abs(x(best) - at)) best = i; });
    select(best, { scroll: true });
  });
  const left = data.mode === "rows" ? "rows in order" : `position 0 (shaded: the first ${Math.min(data.early, total)}, kept out of the headline)`;
  byId("strip").append(root, el("p", {}, el("span", {}, left), el("span", {}, data.mode === "rows" ? "" : String(total - 1))));
  byId("strip").hidden = false;
}

// -- the panel -----------------------------------------------------------------------------------------------------
function highlighted(text) {
  const node = el("p");
  if (!query) {
    node.textContent = text;
    return node;
  }
  const pattern = new RegExp(query.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "gi");
  let from = 0;
  for (const match of text.matchAll(pattern)) {
    node.append(text.slice(from, match.index), el("mark", {}, match[0]));
    from = match.index + match[0].length;
  }
  node.append(text.slice(from));
  return node;
}
function sampleNode(sample, many, best) {
  const what = el("div", { class: "what" });
  if (many) what.append(el("b", {}, `sample ${sample.sample}`));
  if (best) what.append(el("span", { class: "badge best" }, "highest cosine"));
  if (sample.failed) what.append(el("span", { class: "badge" }, sample.finish === "length" ? "failed: cut by the length cap" : "failed: no closing tag"));
  if (many && sample.cosine !== null) what.append(`cosine ${fixed(sample.cosine)}`, sample.fve_nrm === null ? "" : ` fve_nrm ${fixed(sample.fve_nrm)}`);
  what.append(el("span", {}, `finish: ${sample.finish}, ${sample.tokens} tokens`));
  return el("div", { class: "sample" }, what, highlighted(sample.text));
}
function panel() {
  const root = byId("panel");
  root.replaceChildren();
  if (selected < 0) {
    const keys = el("span", { class: "keys" }, el("kbd", {}, "←"), " ", el("kbd", {}, "→"), " move along the text, ", el("kbd", {}, "↑"), " ", el("kbd", {}, "↓"), " between its lines.");
    root.append(el("p", { class: "hint" }, `Select a shaded ${data.mode === "rows" ? "row" : "token"} to read its explanation. `, keys));
    return;
  }
  const item = items[selected];
  const button = (label, sign, to) => {
    const node = el("button", { type: "button", "aria-label": label, title: label, disabled: to < 0 || to >= items.length }, sign);
    node.addEventListener("click", () => select(to, { scroll: true }));
    return node;
  };
  root.append(el("div", { class: "head" }, el("h2", {}, name(item)), button("previous", "←", selected - 1), button("next", "→", selected + 1)));
  if (data.mode !== "rows") {
    const [, id, special] = data.tokens[item.at];
    root.append(el("p", { class: "where" }, `position ${item.at}, token id ${id}${special ? ", special token" : ""}`));
  }
  const numbers = el("dl", { class: "numbers" });
  const add = (label, value) => numbers.append(el("div", {}, el("dt", {}, label), el("dd", {}, value)));
  const many = item.samples.length > 1;
  add("|h|", norm(item.norm));
  if (item.cosine !== null) {
    add("cosine", fixed(item.cosine));
    add("mse_nrm", fixed(item.mse_nrm));
    if (item.fve_nrm !== null) add("fve_nrm", fixed(item.fve_nrm));
  }
  root.append(numbers);
  if (many && item.cosine !== null) numbers.title = `means over ${item.samples.length} samples`;
  const top = many && item.cosine !== null ? item.samples.reduce((a, b) => (b.cosine > a.cosine ? b : a)) : null;
  for (const sample of item.samples) root.append(sampleNode(sample, many, sample === top));
  root.scrollTop = 0;
}

// -- selection -----------------------------------------------------------------------------------------------------
function select(i, { scroll = false, focus = false, link = true } = {}) {
  if (i < 0 || i >= items.length) return;
  if (selected >= 0) {
    nodes[selected].classList.remove("here");
    nodes[selected].setAttribute("aria-pressed", "false");
    nodes[selected].tabIndex = -1;
  } else nodes[0].tabIndex = -1;
  selected = i;
  const node = nodes[i];
  node.classList.add("here");
  node.setAttribute("aria-pressed", "true");
  node.tabIndex = 0;
  panel();
  if (strip.move) strip.move(i);
  if (focus) node.focus({ preventScroll: true });
  if (scroll) reveal(node);
  if (link) {
    try { history.replaceState(null, "", "#" + items[i].at); } catch { /* some viewers forbid it for local files */ }
  }
}
function reveal(node) {
  const box = node.getBoundingClientRect();
  const sheet = byId("panel").getBoundingClientRect();
  const bottom = getComputedStyle(byId("panel")).position === "fixed" ? sheet.top : innerHeight;
  if (box.top < 70 || box.bottom > bottom - 20) scrollBy({ top: box.top - 70 - (bottom - 70) * 0.35 });
}
function otherLine(i, direction) {
  const at = nodes[i].getClientRects()[0];
  let best = -1;
  let bestCost = Infinity;
  for (let k = i + direction; k >= 0 && k < nodes.length; k += direction) {
    const box = nodes[k].getClientRects()[0];
    if (!box) continue;
    const down = (box.top - at.top) * direction;
    if (down < at.height * 0.6) continue;
    const cost = down * 20 + Math.abs(box.left - at.left);
    if (cost < bestCost) [best, bestCost] = [k, cost];
    else if (down * 20 > bestCost) break;
  }
  return best;
}
function fromLink() {
  const i = itemAt.get(Number(location.hash.slice(1)));
  if (location.hash.length > 1 && i !== undefined) select(i, { scroll: true, link: false });
}

// -- search --------------------------------------------------------------------------------------------------------
function search() {
  query = byId("search").value.trim();
  const wanted = query.toLowerCase();
  let count = 0;
  items.forEach((item, i) => {
    const hit = wanted !== "" && item.samples.some((s) => s.text.toLowerCase().includes(wanted));
    item.hit = hit;
    count += hit;
    nodes[i].classList.toggle("hit", hit);
  });
  byId("found").textContent = wanted ? (count === 1 ? "1 found" : `${count} found`) : "";
  if (selected >= 0) panel();
}
function nextHit(direction) {
  for (let step = 1; step <= items.length; step++) {
    const i = (Math.max(selected, direction > 0 ? -1 : 0) + direction * step + items.length * 2) % items.length;
    if (items[i].hit) return select(i, { scroll: true });
  }
}

// -- start ---------------------------------------------------------------------------------------------------------
legend();
text();
strip();
panel();
if (nodes.length) nodes[0].tabIndex = 0;
byId("text").addEventListener("click", (event) => {
  const node = event.target.closest(".t.on");
  if (node) select(Number(node.dataset.i), { focus: true, scroll: true });
});
byId("search").addEventListener("input", search);
byId("search").addEventListener("keydown", (event) => {
  if (event.key === "Enter") nextHit(event.shiftKey ? -1 : 1);
  if (event.key === "Escape") { byId("search").value = ""; search(); byId("search").blur(); }
});
document.addEventListener("keydown", (event) => {
  if (event.target === byId("search") || event.ctrlKey || event.metaKey || event.altKey || !items.length) return;
  const inText = byId("text").contains(document.activeElement);
  let to = -1;
  if (event.key === "ArrowRight") to = selected + 1;
  else if (event.key === "ArrowLeft") to = selected < 0 ? 0 : selected - 1;
  else if (inText && selected >= 0 && event.key === "ArrowDown") to = otherLine(selected, 1);
  else if (inText && selected >= 0 && event.key === "ArrowUp") to = otherLine(selected, -1);
  else if (inText && event.key === "Home") to = 0;
  else if (inText && event.key === "End") to = items.length - 1;
  else if (inText && (event.key === "Enter" || event.key === " ")) to = Number(document.activeElement.dataset.i ?? -1);
  else if (event.key === "/") byId("search").focus();
  else return;
  event.preventDefault();
  select(to, { focus: true, scroll: true });
});
addEventListener("hashchange", fromLink);
fromLink();
