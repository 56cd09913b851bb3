// Search on pages that are opened from a disk. Browsers start no worker there, so its script runs in a hidden frame instead.
// The themes of the site load a script from another host for this, unless `extra.polyfills` names one called iframe-worker.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #frame = document.createElement("iframe");
    #waiting = [];

    constructor(url) {
      super();
      this.#frame.hidden = true;
      document.documentElement.append(this.#frame);
      const inside = this.#frame.contentWindow;
      inside.postMessage = (data) => this.#deliver(this, data);
      const script = inside.document.createElement("script");
      script.src = new URL(url, document.baseURI).href;
      script.onload = () => {
        const waiting = this.#waiting;
        this.#waiting = null;
        waiting.forEach((data) => this.#deliver(inside, data));
      };
      script.onerror = () => this.dispatchEvent(new Event("error"));
      inside.document.body.append(script);
    }

    postMessage(data) {
      if (this.#waiting) this.#waiting.push(data);
      else this.#deliver(this.#frame.contentWindow, data);
    }

    terminate() {
      this.#frame.remove();
    }

    #deliver(target, data) {
      setTimeout(() => {
        const event = new MessageEvent("message", { data });
        if (target === this) this.onmessage?.(event);
        target.dispatchEvent(event);
      });
    }
  };
}
