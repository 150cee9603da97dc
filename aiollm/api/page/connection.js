// The chat socket: opened when the model is ready, kept alive, opened again after a loss.

import { loadKey, saveKey } from "./store.js";

const PATH = "v1/chat/ws";
const SHORTEST = 500; // milliseconds until the first new try
const LONGEST = 8000;
const LOADING = 700; // between looks while the model loads
const SILENCE = 20000; // without a frame a ping asks for one
const PATIENCE = 10000; // for its answer

/** A key as a subprotocol, since no header can be set; only some characters may stand there. */
const encoded = (key) => btoa(key).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");

/**
 * `onstate(name, detail)` with loading, ready, lost, locked (an API key is asked for) or stopped; `onframe(frame)` for
 * every frame but hello and pong.
 */
export class Connection {
  constructor({ onstate, onframe }) {
    this.onstate = onstate;
    this.onframe = onframe;
    this.hello = null;
    this.tries = 0;
    this.timer = 0;
    this.socket = null;
    this.key = loadKey();
    addEventListener("online", () => this.hurry());
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.hurry(); });
    this.connect();
  }

  get ready() {
    return this.hello !== null;
  }

  /** Whether it was sent. */
  send(frame) {
    if (!this.ready) return false;
    this.socket.send(JSON.stringify(frame));
    return true;
  }

  /** Try again with an API key. */
  unlock(key) {
    this.key = key;
    this.#later(0);
  }

  /** Try again now rather than later. */
  hurry() {
    if (this.socket === null && this.timer !== 0) this.#later(0);
  }

  async connect() {
    let status;
    try {
      const answer = await fetch("ready", { cache: "no-store" });
      status = await answer.json();
    } catch {
      this.#lost();
      return;
    }
    if (status.status === "ready") {
      this.#open();
    } else if (status.status === "loading") {
      this.tries = 0;
      this.onstate("loading", { phase: status.phase, progress: status.progress });
      this.#later(LOADING);
    } else {
      this.onstate("stopped", { reason: status.error || `The server is ${status.status}` });
      this.#later(LONGEST);
    }
  }

  #open() {
    const url = new URL(PATH, document.baseURI);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    const socket = this.key ? new WebSocket(url, ["aiollm", `aiollm.key.${encoded(this.key)}`]) : new WebSocket(url);
    this.socket = socket;
    socket.onmessage = ({ data }) => {
      this.#listen();
      const frame = JSON.parse(data);
      if (frame.type === "hello") {
        this.hello = frame;
        this.tries = 0;
        saveKey(this.key);
        this.onstate("ready", frame);
      } else if (frame.type !== "pong") {
        this.onframe(frame);
      }
    };
    socket.onclose = () => (this.ready ? this.#lost() : this.#ask());
    this.#listen();
  }

  /** A browser does not tell why a socket did not open: ask for what its address answers to others. */
  async #ask() {
    let status = 0;
    let error;
    try {
      const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
      const answer = await fetch(PATH, { method: "POST", headers, cache: "no-store" });
      status = answer.status;
      ({ error } = await answer.json());
    } catch {
      status = 0; // nobody answers, or it is somebody else
    }
    this.#lost();
    if (status === 401) {
      clearTimeout(this.timer);
      this.timer = 0;
      this.onstate("locked", { wrong: this.key !== "" });
      this.key = "";
      saveKey("");
    } else if (status === 403) {
      this.onstate("stopped", { reason: error.message });
    }
  }

  /** A sign of life came: wait for the next one. */
  #listen() {
    clearTimeout(this.pulse);
    this.pulse = setTimeout(() => {
      this.send({ type: "ping" });
      this.pulse = setTimeout(() => this.#lost(), PATIENCE);
    }, SILENCE);
  }

  #lost() {
    clearTimeout(this.pulse);
    if (this.socket !== null) {
      this.socket.onclose = this.socket.onmessage = null;
      this.socket.close();
    }
    this.socket = this.hello = null;
    const wait = Math.min(LONGEST, SHORTEST * 2 ** this.tries++) * (0.75 + Math.random() / 2);
    this.onstate("lost", { seconds: Math.ceil(wait / 1000) });
    this.#later(wait);
  }

  #later(milliseconds) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.timer = 0;
      this.connect();
    }, milliseconds);
  }
}
