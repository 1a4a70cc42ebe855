// The page of `itm serve`. It speaks only to the service that it came from, and puts all that it gets in as text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const state = { models: [], photo: null, like: null, lists: [], round: 0 };
const PAGE = 30, LARGEST = 1600;

function make(tag, given = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...inside);
  return made;
}

async function call(path, body) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  let reply;
  try {
    reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Error("The service does not answer. Look whether it runs, then ask again.");
  }
  if (reply.status === 401) { await login(); return call(path, body); }
  if (!reply.ok) {
    const said = await reply.json().catch(() => ({ error: `status ${reply.status}`, remedy: "ask again later" }));
    throw new Error(`${said.error}. What helps: ${said.remedy}.`);
  }
  return reply;
}

function login() {
  const box = $("login");
  if (!box.open) { $("token").value = ""; box.showModal(); }
  return new Promise((done) => box.addEventListener("close", () => { sessionStorage.setItem("token", $("token").value); done(); }, { once: true }));
}

async function show(picture, address) {
  if (!sessionStorage.getItem("token")) { picture.src = address; return; }
  try {
    picture.src = URL.createObjectURL(await (await call(address)).blob());
  } catch {
    picture.dispatchEvent(new Event("error"));
  }
}

function say(text, wrong = false) {
  $("said").textContent = text;
  $("said").classList.toggle("wrong", wrong);
}

// ------------------------------------------------------------------ models and filters
async function start() {
  try {
    state.models = (await (await call("/v1/models")).json()).models;
  } catch (error) { say(error.message, true); $("about").textContent = ""; return; }
  for (const { name } of state.models) {
    $("model").append(make("option", { value: name }, name));
    $("beside").append(make("option", { value: name }, name));
  }
  $("model-label").hidden = $("beside-label").hidden = state.models.length < 2;
  describe();
  say("Type what to look for, or drop a photo anywhere on the page.");
}

const chosen = () => state.models.find((model) => model.name === $("model").value) || state.models[0];

function describe() {
  const model = chosen();
  const problem = model.problem ? ` A newer version was refused: ${model.problem}` : "";
  $("about").textContent = `${model.images.toLocaleString()} photos, ${model.captions.toLocaleString()} captions, by ${model.name} (${model.kind}, version ${model.version}).${problem}`;
  $("sure-label").hidden = !model.calibrated;
  $("photo-label").hidden = !model.asks.includes("image");
  const fields = Object.entries(model.fields);
  $("filters").hidden = !fields.length;
  $("filters").lastElementChild.replaceChildren(...fields.map(([field, values]) => {
    const inside = values.length
      ? values.map((value) => make("label", {}, make("input", { type: "checkbox", name: field, value, onchange: ask }), value))
      : [make("input", { type: "text", name: field, placeholder: "value or 10..20", "aria-label": `${field}: value or range`, onchange: ask })];
    return make("fieldset", {}, make("legend", {}, field), ...inside);
  }));
}

function filters() {
  const where = {};
  for (const input of $("filters").querySelectorAll("input")) {
    const value = input.type === "checkbox" ? input.checked && input.value : input.value.trim();
    if (value) (where[input.name] ||= []).push(value);
  }
  return where;
}

// ------------------------------------------------------------------ asking
function question(offset) {
  const asked = { k: PAGE, offset, find: $("find").value, where: filters() };
  if ($("text").value.trim()) asked.text = $("text").value.trim();
  if (state.photo) asked.image = state.photo.data;
  if (state.like) asked.like = state.like;
  if (+$("sure").value && chosen().calibrated) asked.min_score = +$("sure").value / 100;
  return asked;
}

async function ask() {
  const first = question(0);
  if (!first.text && !first.image && !first.like) { say("Type what to look for, or drop a photo anywhere on the page."); return; }
  const round = ++state.round, begun = performance.now();
  const names = [$("model").value];
  if ($("beside").value && $("beside").value !== names[0]) names.push($("beside").value);
  say("Searching …");
  try {
    const lists = await Promise.all(names.map(async (name) => (await call("/v1/search", { ...first, model: name })).json()));
    if (round !== state.round) return;
    state.lists = lists;
    draw();
    const took = Math.round(performance.now() - begun);
    const [one] = lists;
    if (lists.every((list) => list.nothing_found)) say(nothing(first, one));
    else say(`The best of ${one.total.toLocaleString()} ${one.find === "images" ? "photos" : "captions"}, ${took} ms, version ${lists.map((list) => list.version).join(" and ")}.`);
  } catch (error) {
    if (round === state.round) { say(error.message, true); $("results").replaceChildren(); }
  }
}

function nothing(asked, list) {
  if (!list.total) return "Nothing found: no photo passes the filters.";
  return `Nothing found: none of ${list.total.toLocaleString()} is a true match with a probability of at least ${Math.round(100 * asked.min_score)} %.`;
}

async function more(place, button) {
  const list = state.lists[place];
  button.disabled = true;
  try {
    const asked = { ...question(list.answers.length), model: list.model, version: list.version };
    const next = await (await call("/v1/search", asked)).json();
    const before = list.answers.length;
    list.answers.push(...next.answers);
    draw();
    $("results").querySelectorAll("section")[place].querySelectorAll("li > button")[before]?.focus();
  } catch (error) { say(error.message, true); button.disabled = false; }
}

// ------------------------------------------------------------------ drawing
const certainty = (answer) => answer.probability === null ? answer.score.toFixed(3) : `${Math.round(100 * answer.probability)} %`;
const spoken = (answer) => answer.probability === null ? `score ${answer.score.toFixed(3)}` : `probability ${Math.round(100 * answer.probability)} percent`;

function draw() {
  const two = state.lists.length > 1;
  $("results").classList.toggle("two", two);
  const shared = two ? new Set(state.lists[0].answers.map((answer) => answer.key).filter((key) => state.lists[1].answers.some((other) => other.key === key))) : new Set();
  $("results").replaceChildren(...state.lists.map((list, place) => {
    const items = list.answers.map((answer) => make("li", {}, list.find === "images" ? tile(answer, list) : line(answer, list)));
    const inside = [make(list.find === "images" ? "ul" : "ol", { className: list.find === "images" ? "grid" : "list" }, ...items)];
    if (two) {
      const both = list.answers.filter((answer) => shared.has(answer.key)).length;
      inside.unshift(make("h2", {}, `${list.model} · version ${list.version}`, make("span", { className: "quiet" }, ` ${both} of ${list.answers.length} in both`)));
    }
    if (list.answers.length && list.answers.length % PAGE === 0 && list.answers.length < list.total)
      inside.push(make("button", { type: "button", className: "more", onclick: (event) => more(place, event.target) }, "More"));
    return make("section", { "aria-label": `Answers of ${list.model}` }, ...inside);
  }));
}

function tile(answer, list) {
  const caption = answer.captions[0] || answer.key;
  const none = make("span", { className: "none", hidden: true }, answer.key);
  const picture = make("img", { alt: "", loading: "lazy", decoding: "async" });
  picture.addEventListener("load", () => {
    const ratio = Math.min(3, Math.max(0.6, picture.naturalWidth / picture.naturalHeight));
    const item = picture.closest("li"), row = picture.parentElement.clientHeight || 190;
    if (item) { item.style.flexGrow = ratio; item.style.flexBasis = `${Math.round(ratio * row)}px`; }
  });
  picture.addEventListener("error", () => { picture.hidden = true; none.hidden = false; });
  show(picture, answer.photo);
  return make("button", { type: "button", className: "tile", "aria-label": `${answer.rank}. ${caption}, ${spoken(answer)}`, onclick: () => open(answer, list) },
    make("span", { className: "picture" }, picture, none),
    make("span", { className: "words" }, make("b", {}, certainty(answer)), make("span", {}, caption)));
}

const line = (answer, list) => make("button", { type: "button", "aria-label": `${answer.rank}. ${answer.captions[0]}, ${spoken(answer)}`, onclick: () => open(answer, list) },
  make("b", {}, certainty(answer)), make("span", {}, answer.captions[0]));

// ------------------------------------------------------------------ one photo, large
const stage = () => $("large").querySelector(".stage");

async function open(answer, list) {
  const box = $("large"), picture = stage().querySelector("img");
  $("large-title").textContent = answer.captions[0] || answer.key;
  box.querySelector(".captions").textContent = answer.captions.slice(1).join("\n");
  box.querySelector(".words").hidden = true;
  box.querySelector(".why").textContent = "";
  stage().querySelector("svg").replaceChildren();
  picture.removeAttribute("src");
  picture.alt = answer.captions[0] || answer.key;
  picture.onerror = () => { box.querySelector(".why").textContent = "The index holds this photo, but its file cannot be shown."; };
  show(picture, `${answer.photo}&large=true`);
  const facts = { key: answer.key, score: answer.score.toFixed(4), ...(answer.probability === null ? {} : { probability: `${(100 * answer.probability).toFixed(1)} %` }), shard: answer.shard, ...answer.metadata };
  box.querySelector("dl").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));
  box.querySelector(".similar").onclick = () => { box.close(); by(answer); };
  box.showModal();
  const text = list.find === "captions" ? answer.captions[0] : $("text").value.trim() || answer.captions[0];
  const model = state.models.find((one) => one.name === list.model);
  if (text && model && model.explains) await explain(text, answer, list);
}

async function explain(text, answer, list) {
  const box = $("large");
  let told;
  try {
    told = await (await call("/v1/explain", { text, key: answer.key, model: list.model })).json();
  } catch (error) { box.querySelector(".why").textContent = error.message; return; }
  if (!box.open || box.querySelector("dd").textContent !== answer.key) return;
  const svg = stage().querySelector("svg");
  svg.setAttribute("viewBox", `0 0 ${told.width} ${told.height}`);
  const rects = told.boxes.map(([x1, y1, x2, y2]) => {
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of Object.entries({ x: x1, y: y1, width: Math.max(0, x2 - x1), height: Math.max(0, y2 - y1), "fill-opacity": 0, "stroke-opacity": 0 })) rect.setAttribute(name, value);
    return rect;
  });
  svg.replaceChildren(...rects);
  const words = told.words.map((word, place) => {
    const weights = told.weights[place], most = Math.max(...weights, 1e-9);
    const best = weights.indexOf(Math.max(...weights));
    const look = () => {
      for (const other of words) other.setAttribute("aria-pressed", String(other === button));
      rects.forEach((rect, n) => {
        rect.setAttribute("fill-opacity", (0.55 * weights[n] / most).toFixed(3));
        rect.setAttribute("stroke-opacity", n === best ? 1 : 0);
      });
    };
    const button = make("button", { type: "button", "aria-pressed": "false", onmouseenter: look, onfocus: look, onclick: look }, word);
    button.setAttribute("aria-label", `${word}: looks most at region ${best + 1} of ${weights.length}, ${Math.round(100 * weights[best])} percent`);
    return button;
  });
  box.querySelector(".words .list").replaceChildren(...words);
  box.querySelector(".words").hidden = false;
}

// ------------------------------------------------------------------ photos to ask by
function by(answer) {
  state.like = answer.key; state.photo = null;
  $("text").value = ""; $("find").value = "images";
  chip(answer.photo, `like ${answer.key}`);
  ask();
}

function chip(address, said) {
  $("chip").hidden = !address;
  if (!address) return;
  show($("chip").querySelector("img"), address);
  $("chip").querySelector("span").textContent = said;
}

async function take(file) {
  if (!file) return;
  if (!chosen() || !chosen().asks.includes("image")) { say("This model reads regions of a detector: it cannot be asked by a photo.", true); return; }
  try {
    const small = await smaller(file);
    const data = await new Promise((done, fail) => { const reader = new FileReader(); reader.onload = () => done(reader.result); reader.onerror = fail; reader.readAsDataURL(small); });
    state.photo = { data }; state.like = null;
    chip(data, file.name);
    ask();
  } catch { say(`${file.name} is no photo that this browser can read.`, true); }
}

async function smaller(file) {
  const bitmap = await createImageBitmap(file);
  const scale = LARGEST / Math.max(bitmap.width, bitmap.height);
  if (scale >= 1 && file.size < 4e6 && /^image\/(jpeg|png|webp)$/.test(file.type)) return file;
  const canvas = make("canvas", { width: Math.round(bitmap.width * Math.min(1, scale)), height: Math.round(bitmap.height * Math.min(1, scale)) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
}

// ------------------------------------------------------------------ events
$("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("find").addEventListener("change", ask);
$("model").addEventListener("change", () => { describe(); ask(); });
$("beside").addEventListener("change", ask);
$("sure").addEventListener("input", () => { $("sure-said").textContent = +$("sure").value ? `${$("sure").value} %` : "any"; });
$("sure").addEventListener("change", ask);
$("file").addEventListener("change", () => { take($("file").files[0]); $("file").value = ""; });
$("chip").querySelector("button").addEventListener("click", () => { state.photo = state.like = null; chip(); $("text").focus(); ask(); });
$("large").querySelector(".close").addEventListener("click", () => $("large").close());
$("large").addEventListener("click", (event) => { if (event.target === $("large")) $("large").close(); });
document.addEventListener("paste", (event) => { const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/")); if (file) take(file); });
let inside = 0;
document.addEventListener("dragenter", (event) => { event.preventDefault(); inside++; $("drop").hidden = false; });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("dragleave", () => { if (--inside <= 0) { inside = 0; $("drop").hidden = true; } });
document.addEventListener("drop", (event) => { event.preventDefault(); inside = 0; $("drop").hidden = true; take(event.dataTransfer.files[0]); });
document.addEventListener("keydown", (event) => { if (event.key === "/" && !/INPUT|SELECT/.test(document.activeElement.tagName) && !$("large").open) { event.preventDefault(); $("text").focus(); } });
start();
