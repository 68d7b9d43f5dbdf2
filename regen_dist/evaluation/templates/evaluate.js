"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const COLOURS = ["#3056d3", "#d9480f", "#2b8a3e", "#ae3ec9", "#e0a100", "#0c8599", "#868e96", "#c2255c"];
const colour = (model) => COLOURS[model % COLOURS.length];
const names = ["source", ...data.models];
let frame = 0, divider = 0.5, playing = false, row = [];

const video = () => data.videos[+at("video").value];
const file = (choice) => (choice === 0 ? video().source : video().models[choice - 1].file);
const players = () => [at("a"), at("b"), ...row];
const seconds = (number) => (number + 0.5) / video().fps;  // the middle of a frame: no rounding shows its neighbour

function option(select, value, text) {
  const made = document.createElement("option");
  made.value = value; made.textContent = text;
  select.append(made);
}

function load() {
  stop();
  const [width, height] = video().size;
  at("stage").style.aspectRatio = `${width} / ${height}`;
  at("a").src = file(+at("left").value);
  at("b").src = file(+at("right").value);
  at("name-a").textContent = names[+at("left").value];
  at("name-b").textContent = names[+at("right").value];
  at("row").replaceChildren();
  row = names.map((name, choice) => {
    const figure = document.createElement("figure"), player = document.createElement("video");
    const caption = document.createElement("figcaption");
    Object.assign(player, { src: file(choice), muted: true, playsInline: true, preload: "auto" });
    caption.textContent = name;
    figure.append(player, caption);
    at("row").append(figure);
    return player;
  });
  at("seek").max = video().frames - 1;
  for (const player of players()) player.addEventListener("loadedmetadata", () => (player.currentTime = seconds(frame)));
  measures();
  go(0);
}

function go(number) {
  frame = Math.max(0, Math.min(video().frames - 1, number));
  if (!playing) for (const player of players()) if (player.readyState) player.currentTime = seconds(frame);
  at("seek").value = frame;
  at("place").textContent = `frame ${frame} of ${video().frames}`;
  mark();
}

function stop() {
  playing = false;
  at("play").textContent = "Play";
  for (const player of players()) player.pause();
}

function play() {
  if (playing) { stop(); go(frame); return; }
  if (frame >= video().frames - 1) go(0);
  playing = true;
  at("play").textContent = "Pause";
  for (const player of players()) player.play();
  requestAnimationFrame(tick);
}

// All follow the first: one that is more than half a frame off is set to its time.
function tick() {
  if (!playing) return;
  const lead = at("a"), now = lead.currentTime;
  for (const player of players()) {
    if (Math.abs(player.currentTime - now) > Math.max(0.5 / video().fps, 0.03)) player.currentTime = now;
  }
  go(Math.floor(now * video().fps + 1e-3));
  if (lead.ended || frame >= video().frames - 1) { stop(); go(video().frames - 1); return; }
  requestAnimationFrame(tick);
}

function divide(share) {
  divider = Math.max(0, Math.min(1, share));
  at("b").style.clipPath = `inset(0 0 0 ${divider * 100}%)`;
  at("stage").querySelector("i").style.left = `${divider * 100}%`;
}

// The curves: a line for each model, in SVG.
function svg(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const LEFT = 64, RIGHT = 990, TOP = 12, BOTTOM = 226;
const across = (number) => LEFT + (RIGHT - LEFT) * (video().frames > 1 ? number / (video().frames - 1) : 0.5);

function measures() {
  const chosen = at("measure").value;
  at("measure").replaceChildren();
  const keys = new Set(video().models.flatMap((model) => Object.keys(model.curves)));
  for (const key of keys) option(at("measure"), key, data.titles[key] || key);
  if (keys.has(chosen)) at("measure").value = chosen;
  draw();
}

function draw() {
  const chart = at("curve"), key = at("measure").value;
  chart.replaceChildren();
  at("legend").replaceChildren();
  const lines = video().models.map((model) => model.curves[key] || []);
  const values = lines.flat();
  if (!values.length) return;
  let low = Math.min(...values), high = Math.max(...values);
  if (key === "psnr_db") high = Math.min(high, Math.max(60, low + 1));  // equal frames count as 100 dB
  if (high === low) { high += 1; low -= 1; }
  const up = (value) => BOTTOM - (BOTTOM - TOP) * (Math.min(value, high) - low) / (high - low);
  for (let step = 0; step <= 4; step++) {
    const value = low + (high - low) * step / 4, y = up(value);
    chart.append(svg("line", { x1: LEFT, x2: RIGHT, y1: y, y2: y, stroke: "var(--line)" }));
    const label = { x: LEFT - 8, y: y + 4, "text-anchor": "end", "font-size": 13, fill: "var(--faint)" };
    chart.append(svg("text", label, Number(value.toPrecision(4))));
  }
  for (let step = 0; step <= 4; step++) {
    const number = Math.round((video().frames - 1) * step / 4);
    const label = { x: across(number), y: 248, "text-anchor": "middle", "font-size": 13, fill: "var(--faint)" };
    chart.append(svg("text", label, number));
  }
  lines.forEach((line, model) => {
    const points = line.map((value, number) => `${across(number).toFixed(1)},${up(value).toFixed(1)}`).join(" ");
    chart.append(svg("polyline", { points, fill: "none", stroke: colour(model), "stroke-width": 1.8 }));
    const entry = document.createElement("span"), swatch = document.createElement("b");
    swatch.style.background = colour(model);
    entry.append(swatch, data.models[model]);
    at("legend").append(entry);
  });
  chart.append(svg("line", { id: "cursor", y1: TOP, y2: BOTTOM, stroke: "var(--ink)", "stroke-width": 1 }));
  mark();
}

function mark() {
  const cursor = document.getElementById("cursor");
  if (cursor) for (const side of ["x1", "x2"]) cursor.setAttribute(side, across(frame));
}

function worst() {
  for (const button of at("worst").children) button.hidden = button.dataset.model !== at("worst-model").value;
}

names.forEach((name, choice) => { option(at("left"), choice, name); option(at("right"), choice, name); });
at("right").value = 1;
for (const id of ["video", "left", "right"]) at(id).addEventListener("change", load);
at("measure").addEventListener("change", draw);
at("worst-model").addEventListener("change", worst);
at("play").addEventListener("click", play);
at("back").addEventListener("click", () => { stop(); go(frame - 1); });
at("next").addEventListener("click", () => { stop(); go(frame + 1); });
at("seek").addEventListener("input", () => { stop(); go(+at("seek").value); });
const move = (event) => {
  const box = at("stage").getBoundingClientRect();
  divide((event.clientX - box.left) / box.width);
};
at("stage").addEventListener("pointerdown", (event) => { at("stage").setPointerCapture(event.pointerId); move(event); });
at("stage").addEventListener("pointermove", (event) => { if (event.buttons || event.pointerType === "mouse") move(event); });
at("curve").addEventListener("click", (event) => {
  const box = at("curve").getBoundingClientRect(), x = 1000 * (event.clientX - box.left) / box.width;
  stop();
  go(Math.round((video().frames - 1) * (x - LEFT) / (RIGHT - LEFT)));
});
at("worst").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  at("video").value = button.dataset.video;
  at("left").value = 0;
  at("right").value = +button.dataset.model + 1;
  load();
  go(+button.dataset.frame);
  at("stage").scrollIntoView({ behavior: "smooth", block: "center" });
});
divide(0.5);
load();
