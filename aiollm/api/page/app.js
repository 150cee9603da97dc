// The chat page: chats, the one that is shown, and the answers under way.

import { Connection } from "./connection.js";
import { $, el } from "./dom.js";
import { dropChat, loadChats, loadSettings, newId, saveChat, saveSettings } from "./store.js";
import { Answer, Question, fit, sends } from "./view.js";

let chats = loadChats();
let chat = blank(); // the one that is shown
let views = new Map(); // message -> view, of the chat that is shown
let settings = loadSettings();
let drawing = 0;
let pinned = true; // whether the end of the conversation stays in view
let lastTop = 0;
const runs = new Map(); // conversation id -> { chat, answer, began }

const connection = new Connection({ onstate: showState, onframe: takeFrame });

// Chats

function blank() {
  return { id: newId(), title: "New chat", updated: 0, messages: [] };
}

function keep(which) {
  which.updated = Date.now();
  chats = [which, ...chats.filter((other) => other.id !== which.id)];
  const messages = which.messages.map(({ role, text, figures, note }) => ({ role, text, figures, note }));
  if (!saveChat({ ...which, messages })) notify("This chat could not be kept: the browser's storage is full or off.");
  drawChats();
}

function show(which) {
  chat = which;
  $("title").textContent = which.title;
  document.title = which.messages.length ? which.title : "New chat";
  $("welcome").hidden = which.messages.length > 0;
  views = new Map();
  $("messages").replaceChildren();
  which.messages.forEach(addView);
  drawChats();
  showRunning();
  scrollToEnd();
}

function addView(message) {
  const view = message.role === "user"
    ? new Question(message, (text) => resend(message, text))
    : new Answer(message, () => regenerate(message));
  views.set(message, view);
  $("messages").append(view.element);
}

function drawChats() {
  const running = new Set(Array.from(runs.values(), (run) => run.chat.id));
  $("chats").replaceChildren(...chats.map((each) => {
    const open = el("button", { type: "button", className: "chat", textContent: each.title, title: each.title });
    if (each.id === chat.id) open.setAttribute("aria-current", "true");
    const sign = running.has(each.id) ? [el("span", { className: "pulse", role: "img", "aria-label": "answering" })] : [];
    open.addEventListener("click", () => {
      show(each);
      closeSidebar();
    });
    const drop = el("button", { type: "button", className: "drop", textContent: "×", "aria-label": `Delete chat: ${each.title}` });
    drop.addEventListener("click", () => remove(each));
    return el("li", {}, open, ...sign, drop);
  }));
}

function remove(which) {
  stop(which, true);
  dropChat(which);
  chats = chats.filter((other) => other !== which);
  if (which === chat) show(blank());
  else drawChats();
  notify("Chat deleted.", "Undo", () => {
    keep(which);
    show(which);
  });
  $("new").focus();
}

function fresh() {
  show(blank());
  closeSidebar();
  $("prompt").focus();
}

// Asking

function ask(text) {
  if (!connection.ready) {
    if ($("status").dataset.state === "locked") $("lock").showModal();
    else notify("Not connected yet. The message stays here until the server is back.");
    return false;
  }
  if (isRunning(chat)) return false;
  if (chat.messages.length === 0) chat.title = text.split("\n")[0].slice(0, 60);
  chat.messages.push({ role: "user", text, figures: null, note: "" });
  answer();
  return true;
}

/** Ask for the answer to the chat's last message. */
function answer() {
  const id = newId();
  const messages = chat.messages.map(({ role, text }) => ({ role, content: text }));
  if (settings.system) messages.unshift({ role: "system", content: settings.system });
  const frame = { type: "chat", id, messages };
  if (settings.temperature !== null) frame.temperature = settings.temperature;
  if (settings.maxTokens !== null) frame.max_tokens = settings.maxTokens;
  const message = { role: "assistant", text: "", figures: null, note: "", running: true };
  chat.messages.push(message);
  runs.set(id, { chat, answer: message, began: 0, stopped: false });
  connection.send(frame);
  keep(chat);
  show(chat);
  announce("Answering");
}

/** Cut the chat before a message; false where nothing can be asked now. */
function cut(message) {
  if (!connection.ready) {
    notify("Not connected.");
    return false;
  }
  stop(chat, true);
  chat.messages.length = chat.messages.indexOf(message);
  return true;
}

function resend(message, text) {
  if (!cut(message)) return;
  if (chat.messages.length === 0) chat.title = text.split("\n")[0].slice(0, 60);
  chat.messages.push({ role: "user", text, figures: null, note: "" });
  answer();
  $("prompt").focus();
}

function regenerate(message) {
  if (!cut(message)) return;
  answer();
  $("prompt").focus();
}

function isRunning(which) {
  return which.messages.some((message) => message.running);
}

/** Cancel the answers of a chat; what they have so far stays. The server's last frame brings their figures. */
function stop(which, forget = false) {
  for (const [id, run] of runs) {
    if (run.chat !== which) continue;
    if (!run.stopped) {
      connection.send({ type: "cancel", id });
      run.stopped = true;
      end(run, "Stopped.");
      announce("Stopped");
    }
    if (forget) runs.delete(id);
  }
}

// Frames

function takeFrame(frame) {
  const run = runs.get(frame.id);
  if (!run) {
    if (frame.type === "error" && frame.id === null) notify(frame.error.message);
    return; // its chat was cut or deleted while this frame was on its way
  }
  const message = run.answer;
  if (frame.type === "start") {
    message.figures = { tokens: 0, pace: 0, first: null, prompt: frame.prompt_tokens, cached: frame.cached_tokens };
  } else if (frame.type === "delta") {
    if (run.stopped) return;
    message.text += frame.text;
    message.reasoning = (message.reasoning ?? "") + (frame.reasoning ?? "");
    message.figures.tokens = frame.tokens;
    const now = performance.now();
    if (run.began === 0) Object.assign(run, { began: now, before: frame.tokens });
    else if (now - run.began > 300) message.figures.pace = ((frame.tokens - run.before) * 1000) / (now - run.began);
  } else if (frame.type === "done") {
    runs.delete(frame.id);
    const { usage, tokens_per_s: pace, ttft_ms: first, finish_reason: reason } = frame;
    if (usage) {
      const cached = usage.prompt_tokens_details.cached_tokens;
      message.figures = { tokens: usage.completion_tokens, pace, first, prompt: usage.prompt_tokens, cached };
    }
    if (reason !== "cancelled") announce(`Answer: ${message.text.slice(0, 600)}`);
    end(run, { length: "The answer was cut: it may have no more tokens.", cancelled: "Stopped." }[reason] ?? "");
  } else {
    runs.delete(frame.id);
    announce(`Failed: ${frame.error.message}`);
    end(run, frame.error.message);
  }
  draw();
}

function end(run, note) {
  run.answer.running = false;
  run.answer.note = note;
  keep(run.chat);
  views.get(run.answer)?.update();
  draw();
  showRunning();
}

/** Show what came, at most once a frame of the screen. A hidden page gets no frames, so it is drawn at once. */
function draw() {
  if (document.hidden) {
    drawNow();
  } else if (drawing === 0) {
    drawing = requestAnimationFrame(drawNow);
  }
}

function drawNow() {
  drawing = 0;
  for (const { answer: message } of runs.values()) views.get(message)?.update();
  if (pinned) scrollToEnd();
}

// What is around the conversation

function showState(name, detail) {
  const words = {
    ready: () => `${detail.model} · ${detail.max_model_len.toLocaleString("en")} tokens`,
    loading: () => `Loading the model: ${detail.phase}${detail.progress > 0 ? ` ${Math.floor(100 * detail.progress)} %` : ""}`,
    lost: () => `Not connected, trying again in ${detail.seconds} s`,
    locked: () => "The server asks for a key.",
    stopped: () => detail.reason,
  };
  $("status").dataset.state = name;
  $("state").textContent = words[name]();
  $("unlock").hidden = name !== "locked";
  if (name === "locked") askForKey(detail.wrong);
  if (name !== "ready") return loseRuns();
  $("model").textContent = detail.model;
  $("lock").close();
}

function askForKey(wrong) {
  $("key-error").textContent = wrong ? "The server does not know this key." : "";
  $("key").setAttribute("aria-invalid", String(wrong));
  $("key").value = "";
  if (!$("lock").open) $("lock").showModal();
  $("key").focus();
}

/** No answer outlives its connection. */
function loseRuns() {
  for (const [id, run] of runs) {
    runs.delete(id);
    if (!run.stopped) end(run, "The connection was lost. Regenerate asks again.");
  }
}

function showRunning() {
  const running = isRunning(chat);
  const focused = document.activeElement === (running ? $("send") : $("stop"));
  $("send").hidden = running;
  $("stop").hidden = !running;
  if (focused) (running ? $("stop") : $("prompt")).focus();
}

function scrollToEnd() {
  $("log").scrollTop = $("log").scrollHeight;
  lastTop = $("log").scrollTop;
  pinned = true;
  $("latest").hidden = true;
}

function announce(text) {
  $("announcer").textContent = text;
}

let noticeTimer = 0;

function notify(text, label = "", action = null) {
  const [words, button] = $("notice").children;
  words.textContent = text;
  button.hidden = !action;
  button.textContent = label;
  button.onclick = () => {
    $("notice").hidden = true;
    action();
  };
  $("notice").hidden = false;
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(() => { $("notice").hidden = true; }, 8000);
}

// Sidebar, colours, settings

function openSidebar() {
  document.body.classList.add("open");
  $("shade").hidden = false;
  $("menu").setAttribute("aria-expanded", "true");
  $("new").focus();
}

function closeSidebar() {
  if (!document.body.classList.contains("open")) return;
  document.body.classList.remove("open");
  $("shade").hidden = true;
  $("menu").setAttribute("aria-expanded", "false");
  $("menu").focus();
}

const THEMES = { system: "as the system", light: "light", dark: "dark" };

function showTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").setAttribute("aria-label", `Colours: ${THEMES[theme]}`);
  $("theme").title = `Colours: ${THEMES[theme]}`;
}

function nextTheme() {
  const names = Object.keys(THEMES);
  const now = document.documentElement.dataset.theme ?? "system";
  const theme = names[(names.indexOf(now) + 1) % names.length];
  showTheme(theme);
  try {
    localStorage.setItem("aiollm.theme", theme);
  } catch {
    // Storage is switched off: the choice holds until the page is left.
  }
}

function fillSettings({ system, temperature, maxTokens }) {
  $("system").value = system;
  $("temperature").value = temperature ?? "";
  $("max-tokens").value = maxTokens ?? "";
}

function takeSettings() {
  const number = (id) => ($(id).value === "" ? null : $(id).valueAsNumber);
  settings = { system: $("system").value.trim(), temperature: number("temperature"), maxTokens: number("max-tokens") };
  saveSettings(settings);
  $("settings").close();
}

// Events

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || !ask(text)) return;
  $("prompt").value = "";
  fit($("prompt"));
});
$("prompt").addEventListener("input", () => fit($("prompt")));
$("prompt").addEventListener("keydown", (event) => {
  if (!sends(event)) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("stop").addEventListener("click", () => stop(chat));
$("ideas").addEventListener("click", ({ target }) => {
  if (target instanceof HTMLButtonElement && ask(target.textContent)) $("prompt").focus();
});
$("log").addEventListener("scroll", () => {
  // Text that came since the scrolling began also leaves a gap below: only a way up shows that somebody reads there.
  const { scrollTop, scrollHeight, clientHeight } = $("log");
  if (scrollHeight - scrollTop - clientHeight < 48) pinned = true;
  else if (scrollTop < lastTop) pinned = false;
  lastTop = scrollTop;
  $("latest").hidden = pinned;
});
$("latest").addEventListener("click", scrollToEnd);
$("new").addEventListener("click", fresh);
$("menu").addEventListener("click", openSidebar);
$("shade").addEventListener("click", closeSidebar);
$("theme").addEventListener("click", nextTheme);
$("open-settings").addEventListener("click", () => {
  fillSettings(settings);
  $("settings").showModal();
});
$("settings-form").addEventListener("submit", (event) => {
  event.preventDefault();
  takeSettings();
});
$("reset").addEventListener("click", () => fillSettings({ system: "", temperature: null, maxTokens: null }));
$("dismiss").addEventListener("click", () => $("settings").close());
$("lock-form").addEventListener("submit", (event) => {
  event.preventDefault();
  connection.unlock($("key").value);
});
$("unlock").addEventListener("click", () => $("lock").showModal());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("settings").open || $("lock").open) return;
  if (document.body.classList.contains("open")) closeSidebar();
  else stop(chat);
});
addEventListener("storage", ({ key }) => {
  if (key !== null && !key.startsWith("aiollm.chat.")) return;
  const known = new Map(chats.map((each) => [each.id, each]));
  chats = loadChats().map((found) => {
    const own = known.get(found.id);
    return own && (own === chat || isRunning(own)) ? own : found;
  });
  drawChats();
});

showTheme(document.documentElement.dataset.theme ?? "system");
show(chat);
$("prompt").focus();
