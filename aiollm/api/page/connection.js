// The chat socket: opened when the model is ready, kept alive, opened again after a loss.

const PATH = "v1/chat/ws";
const SHORTEST = 500; // milliseconds until the first new try
const LONGEST = 8000;
const LOADING = 700; // between looks while the model loads
const SILENCE = 20000; // without a frame a ping asks for one
const PATIENCE = 10000; // for its answer

/** `onstate(name, detail)` with loading, ready, lost or stopped; `onframe(frame)` for every frame but hello and pong. */
export class Connection {
  constructor({ onstate, onframe }) {
    this.onstate = onstate;
    this.onframe = onframe;
    this.hello = null;
    this.tries = 0;
    this.timer = 0;
    this.socket = null;
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
    const socket = new WebSocket(url);
    this.socket = socket;
    socket.onmessage = ({ data }) => {
      this.#listen();
      const frame = JSON.parse(data);
      if (frame.type === "hello") {
        this.hello = frame;
        this.tries = 0;
        this.onstate("ready", frame);
      } else if (frame.type !== "pong") {
        this.onframe(frame);
      }
    };
    socket.onclose = () => this.#lost();
    this.#listen();
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
