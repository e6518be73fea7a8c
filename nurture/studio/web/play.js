// Wordle beside the model: the same secret, and the words it was thinking of; and games of a run, played again.

import { get, post, runPath } from "/static/api.js";
import { announce, complain, el, field, percent, pick } from "/static/ui.js";

const SAYS = { G: "right place", Y: "elsewhere in the word", X: "not in the word" };

export function makePage({ models, runs }) {
  const chat = models.filter((model) => !model.is_base).map((model) => model.id);
  if (!chat.length) return { element: el("section", {}, el("h1", {}, "Play"), el("p", { class: "hint" }, "A base model cannot take turns: serve a stage after SFT.")) };
  let game = null, mine = null, its = null, busy = false;

  const model = pick(chat, chat.at(-1), null, "Model");
  const guess = el("input", { maxLength: 5, autocomplete: "off", autocapitalize: "none", spellcheck: false, size: 8 });
  const form = el("form", { class: "row", onsubmit: (event) => { event.preventDefault(); turn(); } }, field("Your guess", guess), el("button", { class: "main", type: "submit" }, "Guess"));
  const myBoard = el("div", { class: "board big", role: "img" }), itsBoard = el("div", { class: "board big", role: "img" });
  const mySays = el("p", { class: "hint", role: "status" }), itsSays = el("p", { class: "hint" });
  const likely = el("div", { class: "stack" });
  const element = el("section", { "aria-label": "Play" },
    el("h1", {}, "Wordle against the model"),
    el("p", { class: "hint" }, "Both look for the same word. The model guesses after you; its board shows what it said, how sure it was, and which words it found likely."),
    el("div", { class: "row" }, field("Opponent", model), el("button", { type: "button", onclick: begin }, "New game")),
    el("div", { class: "boards" },
      el("div", { class: "card stack" }, el("h2", {}, "You"), myBoard, form, mySays),
      el("div", { class: "card stack" }, el("h2", {}, "The model"), itsBoard, itsSays, likely)),
    runs.length ? replays(runs, model) : null);
  begin();
  return { element, onshow: () => guess.focus({ preventScroll: true }) };

  async function begin() {
    guess.disabled = true; // a guess before there is a word would be lost
    try {
      game = await post("/studio/play/new", {});
      mine = its = null;
      mySays.textContent = itsSays.textContent = "";
      likely.replaceChildren();
      guess.disabled = false;
      guess.maxLength = game.letters;
      draw();
      guess.focus({ preventScroll: true });
    } catch (error) { complain(error); }
  }

  async function turn() {
    if (busy || !game || mine?.over || !guess.value.trim()) return;
    busy = true;
    try {
      const before = mine?.history.length ?? 0;
      mine = await post("/studio/play/person", { game: game.game, guess: guess.value });
      mySays.textContent = mine.over ? mine.says : mine.history.length > before ? "" : mine.says;
      if (mine.history.length > before) {
        guess.value = "";
        announce(mine.history.at(-1).marks.split("").map((mark, place) => `${mine.history.at(-1).word[place]} ${SAYS[mark]}`).join(", "));
        draw();
        await itsTurn();
        while (mine.over && !its.over) await itsTurn();
      }
    } catch (error) { complain(error); }
    busy = false;
    draw();
    guess.disabled = Boolean(mine?.over);
    if (!mine?.over) guess.focus();
  }

  async function itsTurn() {
    if (its?.over) return;
    itsSays.textContent = "thinking…";
    const before = its?.history.length ?? 0;
    its = await post("/studio/play/model", { game: game.game, model: model.value });
    const valid = its.history.length > before;
    const said = `It said “${its.said.trim()}” (${percent(its.probability)})${valid ? "" : ", which is no valid guess"}.`;
    itsSays.textContent = `${said}${its.won ? " It has found the word." : its.over ? " It is out." : ""}`;
    likely.replaceChildren(el("h3", {}, "Words it found likely"), wordBars(its.likely));
    draw();
  }

  function draw() {
    fill(myBoard, mine, "Your board");
    fill(itsBoard, its, "The model's board");
  }

  function fill(board, side, name) {
    const rows = side?.history ?? [];
    board.setAttribute("aria-label", `${name}: ${rows.map((row) => row.marks.split("").map((mark, place) => `${row.word[place]} ${SAYS[mark]}`).join(", ")).join("; ") || "empty"}`);
    board.replaceChildren(...Array.from({ length: game.guesses }, (_, line) => Array.from({ length: game.letters }, (_, place) =>
      el("span", { class: rows[line] ? rows[line].marks[place] : null }, rows[line] ? rows[line].word[place] : ""))).flat());
  }
}

function wordBars(words) {
  const top = Math.max(...words.map((one) => one.probability)) || 1;
  return el("div", { class: "likely" }, words.flatMap((one) => {
    const bar = el("div", { class: "bar" });
    bar.style.width = `${100 * one.probability / top}%`;
    return [el("span", {}, one.word), bar, el("span", {}, percent(one.probability))];
  }));
}

/** Games that the run's stages have left, stepped through turn by turn, each of the model's with its probability. */
function replays(runs, model) {
  let episodes = [], shown = null, upTo = 0, asked = 0;
  const choice = el("select", { "aria-label": "Episode", onchange: () => choose(Number(choice.value)) });
  const body = el("div", { class: "stack" });
  const card = el("details", { class: "card", ontoggle: () => { if (card.open && !shown) load(runs[0]); } },
    el("summary", {}, "Games of the run, played again"),
    el("div", { class: "stack" }, el("div", { class: "row" }, runs.length > 1 && field("Run", pick(runs, runs[0], (event) => load(event.target.value), "Run")), field("Episode", choice)), body));
  model.addEventListener("change", () => { if (shown) draw(); });
  return card;

  async function load(run) {
    try {
      episodes = (await get(runPath(run, "episodes"))).episodes.map((one) => ({ ...one, run }));
      choice.replaceChildren(...episodes.map((one, number) => el("option", { value: number }, `${one.stage} · ${one.task ?? "episode"} ${one.index + 1}${one.reward === null ? "" : ` · reward ${one.reward}`}`)));
      if (episodes.length) choose(0);
      else { shown = null; body.replaceChildren(el("p", { class: "hint" }, "No stage of this run has left games. RL stages with an environment of several turns, such as Wordle, do.")); }
    } catch (error) { complain(error); }
  }

  function choose(number) {
    shown = episodes[number];
    upTo = shown.turns.findIndex((turn) => turn.role === "assistant");
    draw();
  }

  function move(by) {
    upTo = Math.min(Math.max(upTo + by, 0), shown.turns.length - 1);
    draw();
  }

  async function draw() {
    const number = ++asked;
    const seen = el("div", { class: "stack" });
    const buttons = [["First", -shown.turns.length], ["Back", -1], ["Next", 1], ["Last", shown.turns.length]];
    const focused = document.activeElement?.dataset?.move;
    body.replaceChildren(
      el("div", { class: "row" }, buttons.map(([name, by]) => el("button", { type: "button", "data-move": name, onclick: () => move(by) }, name)),
        el("span", { class: "hint small", role: "status" }, `turn ${upTo + 1} of ${shown.turns.length}${shown.secret ? ` · the word is ${shown.secret}` : ""}`)),
      el("ol", { class: "turns" }, shown.turns.slice(0, upTo + 1).map((turn) => el("li", { class: turn.role === "assistant" ? "own" : null },
        el("span", { class: "hint small" }, turn.role), turn.marks ? marked(turn) : el("div", { class: "text" }, turn.text)))),
      seen);
    if (focused) body.querySelector(`[data-move="${focused}"]`)?.focus();
    if (shown.turns[upTo].role !== "assistant") return;
    seen.append(el("p", { class: "hint small" }, "…"));
    try {
      const { probability, likely } = await post("/studio/play/replay", { run: shown.run, stage: shown.stage, index: shown.index, turn: upTo, model: model.value });
      if (number !== asked) return;
      seen.replaceChildren(el("p", { class: "hint" }, `${model.value} would say this with ${percent(probability)}.`), ...(likely.length ? [wordBars(likely)] : []));
    } catch (error) { seen.replaceChildren(); complain(error); }
  }
}

function marked(turn) {
  return el("div", { class: "board", role: "img", "aria-label": turn.guess.split("").map((letter, place) => `${letter} ${SAYS[turn.marks[place]]}`).join(", ") },
    turn.guess.split("").map((letter, place) => el("span", { class: turn.marks[place] }, letter)));
}
