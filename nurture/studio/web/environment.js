// An environment played by a person, through the same WebSocket that clients train on.

import { announce, complain, el, field } from "/static/ui.js";

const dark = matchMedia("(prefers-color-scheme: dark)").matches;
document.documentElement.dataset.theme = dark ? "dark" : "light";
const { name } = await (await fetch("/metadata")).json();
document.getElementById("name").textContent = name;
document.title = `${name} · nurture environment`;
const isWordle = name === "wordle";

let socket = null, waiting = [], busy = false;
const seed = el("input", { type: "number", min: 0, placeholder: "any", "aria-label": "Seed" });
const action = el(isWordle ? "input" : "textarea", { autocomplete: "off", autocapitalize: "none", spellcheck: false, rows: isWordle ? null : 8 });
const send = el("button", { class: "main", type: "submit" }, isWordle ? "Guess" : "Submit");
const form = el("form", { class: isWordle ? "row" : "stack", onsubmit: (event) => { event.preventDefault(); turn(); } },
  field(isWordle ? "Your guess" : "Your answer", action), el("div", { class: "row end" }, send));
const talk = el("div", { class: "stack talk", role: "log", "aria-label": "What was said" });
const board = el("div", { class: "board big", role: "img", "aria-label": "Your board: empty" });
const outcome = el("div", { class: "stack" });
action.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) turn(); });
document.getElementById("main").replaceChildren(el("section", {},
  el("div", { class: "row" }, el("h1", { class: "grow" }, `Play ${name}`), field("Seed", seed), el("button", { type: "button", onclick: begin }, "New game")),
  el("div", { class: "boards" },
    el("div", { class: "card" }, talk),
    el("div", { class: "card stack" }, isWordle ? board : null, form, outcome))));
talk.style.maxHeight = "65vh";
talk.style.overflowY = "auto";
begin();

function connect() {
  return new Promise((resolve, reject) => {
    socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws`);
    socket.onopen = resolve;
    socket.onmessage = (event) => waiting.shift()?.resolve(JSON.parse(event.data));
    socket.onclose = () => {
      const gone = new Error("The server hung up. Is it still running? “New game” connects again.");
      reject(gone);
      waiting.splice(0).forEach((one) => one.reject(gone));
      socket = null;
    };
  });
}

async function ask(type, data) {
  if (!socket) await connect();
  const answer = await new Promise((resolve, reject) => { waiting.push({ resolve, reject }); socket.send(JSON.stringify({ type, data })); });
  if (answer.type === "error") throw new Error(answer.data.message);
  return answer.data;
}

async function begin() {
  await alone(async () => {
    talk.replaceChildren();
    outcome.replaceChildren(el("p", { class: "hint" }, "The game is on."));
    say(await ask("reset", seed.value === "" ? {} : { seed: Number(seed.value) }), null);
    if (isWordle) draw([]);
  });
}

async function turn() {
  const written = action.value.trim();
  if (!written || busy) return;
  await alone(async () => {
    const result = await ask("step", { message: isWordle && !written.startsWith("[") ? `[${written}]` : written });
    const state = isWordle ? await ask("state") : null;
    action.value = "";
    say(result, written); // from here on without waiting: what is seen can be answered
    if (state) draw(state.history);
  });
}

async function alone(work) {
  if (busy) return;
  busy = send.disabled = true;
  try { await work(); } catch (error) { complain(error); }
  busy = send.disabled = false;
  if (!action.disabled) action.focus({ preventScroll: true });
}

function say(result, written) {
  if (written !== null) talk.append(el("p", { class: "asked text" }, written));
  for (const one of result.observation.turns) talk.append(el("p", { class: "text" }, one.content));
  talk.scrollTop = talk.scrollHeight;
  announce(result.observation.prompt);
  action.disabled = result.done;
  form.hidden = result.done;
  if (written === null) return;
  const info = result.observation.info, parts = Object.entries(info.reward_signals ?? {});
  outcome.replaceChildren(
    el("p", {}, el("span", { class: `pill ${info.won ? "good" : result.done ? "warn" : ""}` }, info.won ? "won" : result.done ? "lost" : "on"), ` reward ${result.reward}`),
    el("table", {}, el("tbody", {}, parts.map(([part, value]) => el("tr", {}, el("td", {}, part), el("td", { class: "number" }, value.toFixed(2)))))));
}

function draw(history) {
  const letters = history[0]?.word.length ?? 5;
  const rows = [...history, ...Array(Math.max(6 - history.length, 0)).fill(null)];
  board.style.gridTemplateColumns = `repeat(${letters}, 2.7rem)`;
  board.setAttribute("aria-label", `Your board: ${history.map((row) => `${row.word} ${row.marks}`).join("; ") || "empty"}`);
  board.replaceChildren(...rows.flatMap((row) => Array.from({ length: letters }, (_, place) =>
    el("span", { class: row?.marks[place] }, row?.word[place] ?? ""))));
}
