// Wordle beside the model: the same secret, and the words it was thinking of.

import { post } from "/static/api.js";
import { announce, complain, el, field, percent, pick } from "/static/ui.js";

const SAYS = { G: "right place", Y: "elsewhere in the word", X: "not in the word" };

export function makePage({ models }) {
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
      el("div", { class: "card stack" }, el("h2", {}, "The model"), itsBoard, itsSays, likely)));
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
    const top = Math.max(...its.likely.map((one) => one.probability)) || 1;
    likely.replaceChildren(el("h3", {}, "Words it found likely"), el("div", { class: "likely" }, its.likely.flatMap((one) => {
      const bar = el("div", { class: "bar" });
      bar.style.width = `${100 * one.probability / top}%`;
      return [el("span", {}, one.word), bar, el("span", {}, percent(one.probability))];
    })));
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
