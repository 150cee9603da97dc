// How messages look. A view shows one message and is told when that message has changed.

import { copyButton, el } from "./dom.js";
import { Markdown } from "./markdown.js";

/** A message of the user; `onedit(text)` is called with its new text. */
export class Question {
  constructor(message, onedit) {
    this.message = message;
    this.onedit = onedit;
    this.element = el("article", { className: "message user", "aria-label": "You" });
    this.#show();
  }

  #show() {
    const edit = el("button", { type: "button", className: "plain", textContent: "Edit", onclick: () => this.#edit() });
    this.element.replaceChildren(
      el("div", { className: "text", textContent: this.message.text }),
      el("div", { className: "actions" }, edit, copyButton(() => this.message.text)),
    );
    return edit;
  }

  #edit() {
    const field = el("textarea", { value: this.message.text, "aria-label": "Your message" });
    const cancel = () => this.#show().focus();
    const send = () => field.value.trim() && this.onedit(field.value.trim());
    field.addEventListener("input", () => fit(field));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      } else if (sends(event)) {
        event.preventDefault();
        send();
      }
    });
    this.element.replaceChildren(
      field,
      el("div", { className: "actions" },
        el("button", { type: "button", textContent: "Cancel", onclick: cancel }),
        el("button", { type: "button", className: "main", textContent: "Send again", onclick: send })),
    );
    fit(field);
    field.focus();
  }
}

/** An answer, whole or under way. */
export class Answer {
  constructor(message, onagain) {
    this.message = message;
    this.text = el("div", { className: "text" });
    this.thoughts = el("div", { className: "thoughts" });
    this.reasoning = el("details", { className: "reasoning", hidden: true },
      el("summary", { textContent: "Reasoning" }), this.thoughts);
    this.note = el("p", { className: "note", hidden: true });
    this.figures = el("p", { className: "figures" });
    this.again = el("button", { type: "button", className: "plain", textContent: "Regenerate", onclick: onagain });
    this.actions = el("div", { className: "actions" }, copyButton(() => message.text), this.again);
    this.element = el("article", { className: "message assistant", "aria-label": "Answer" },
      this.reasoning, this.text, this.note, el("footer", {}, this.figures, this.actions));
    this.markdown = new Markdown(this.text);
    this.shown = 0; // characters of the message's text
    this.update();
  }

  /** Show what is new. */
  update() {
    const { text, reasoning = "", figures, note, running } = this.message;
    const thought = this.thoughts.textContent.length;
    if (reasoning.length > thought) this.thoughts.append(reasoning.slice(thought));
    this.reasoning.hidden = !reasoning;
    if (text.length > this.shown) {
      this.markdown.push(text.slice(this.shown));
      this.shown = text.length;
    }
    this.element.classList.toggle("running", Boolean(running));
    this.element.classList.toggle("waiting", Boolean(running) && !text && !reasoning);
    this.element.setAttribute("aria-busy", String(Boolean(running)));
    this.note.hidden = !note;
    this.note.textContent = note;
    this.actions.hidden = Boolean(running);
    showFigures(this.figures, figures);
  }
}

/** The line under an answer: tokens, pace, time to the first token, and how much of the prompt was cached. */
function showFigures(line, figures) {
  const { tokens, pace, first, prompt, cached } = figures ?? {};
  const parts = [];
  if (tokens > 0) parts.push([`${tokens} ${tokens === 1 ? "token" : "tokens"}`, "Length of the answer"]);
  if (pace > 0) parts.push([`${pace < 100 ? pace.toFixed(1) : Math.round(pace)} tokens/s`, "Pace after the first token"]);
  if (first >= 0 && first !== null) parts.push([`first token ${seconds(first)}`, "From sending to the first token"]);
  const shown = parts.map(([text, title]) => el("span", { textContent: text, title }));
  if (prompt > 0) {
    const share = Math.min(1, cached / prompt);
    const bar = el("span", { className: "bar", "aria-hidden": "true" }, el("span"));
    bar.firstChild.style.width = `${100 * share}%`;
    const words = `${cached} of ${prompt} prompt tokens cached`;
    shown.push(el("span", { className: "cached", title: "Prompt tokens that did not have to be computed again" }, bar, words));
  }
  line.replaceChildren(...shown);
}

const seconds = (milliseconds) =>
  milliseconds < 1000 ? `${Math.max(1, Math.round(milliseconds))} ms` : `${(milliseconds / 1000).toFixed(2)} s`;

/** Whether a key in a text field sends it; input methods use Enter for themselves. */
export const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

/** A text field as high as its text. */
export function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}
