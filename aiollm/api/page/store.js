// Chats and settings in the browser's storage, one key for each chat so that two tabs do not overwrite each other.

const CHAT = "aiollm.chat.";
const SETTINGS = "aiollm.settings";
const KEY = "aiollm.key";
const MOST = 200; // chats kept; the oldest goes first

const text = (value) => (typeof value === "string" ? value : "");
const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);

/** An id that no other chat or conversation has; crypto.randomUUID is missing over plain HTTP. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

/** Whether it was kept. */
function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export function loadSettings() {
  const found = read(SETTINGS) ?? {};
  return { system: text(found.system), temperature: number(found.temperature), maxTokens: number(found.maxTokens) };
}

export const saveSettings = (settings) => write(SETTINGS, settings);

/** The API key, which lives as long as the tab. */
export function loadKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return ""; // storage is switched off
  }
}

export function saveKey(key) {
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // Storage is switched off: the key holds until the page is left.
  }
}

/** Every chat, the latest first. What is stored is not trusted: other versions of this page may have written it. */
export function loadChats() {
  const chats = [];
  try {
    for (const key of Object.keys(localStorage)) {
      const chat = key.startsWith(CHAT) ? read(key) : null;
      if (!chat || !Array.isArray(chat.messages) || text(chat.id) !== key.slice(CHAT.length)) continue;
      const messages = chat.messages.filter((message) => message && ["user", "assistant"].includes(message.role));
      chats.push({
        id: chat.id,
        title: text(chat.title) || "Chat",
        updated: number(chat.updated) ?? 0,
        messages: messages.map(({ role, text: words, figures, note }) => ({
          role, text: text(words), figures: figures && typeof figures === "object" ? figures : null, note: text(note),
        })),
      });
    }
  } catch {
    return []; // storage is switched off
  }
  return chats.sort((a, b) => b.updated - a.updated);
}

/** Keep a chat, at the cost of the oldest ones where there is no room. False where it cannot be kept. */
export function saveChat(chat) {
  const others = loadChats().filter((other) => other.id !== chat.id);
  for (const old of others.splice(MOST - 1)) dropChat(old);
  while (!write(CHAT + chat.id, chat)) {
    const oldest = others.pop();
    if (!oldest) return false;
    dropChat(oldest);
  }
  return true;
}

export function dropChat(chat) {
  try {
    localStorage.removeItem(CHAT + chat.id);
  } catch {
    // Storage is switched off: there was nothing to remove.
  }
}
