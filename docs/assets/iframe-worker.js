// A page opened as a file may start no worker. There, one is played by a hidden frame, so that the search works.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.title = "search";
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      // The worker's own names: what it is sent, how it answers, how it loads more scripts.
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}));
      inside.importScripts = (...urls) =>
        urls.reduce((before, one) => before.then(() => this.load(one)), Promise.resolve());
      inside.addEventListener("error", event => this.dispatchEvent(new ErrorEvent("error", event)));
      this.load(url).then(() => {
        this.ready = true;
        this.waiting.splice(0).forEach(data => this.tell(data));
      });
    }
    load(url) {
      return new Promise((done, failed) => {
        const script = this.frame.contentDocument.createElement("script");
        script.src = new URL(url, location.href);
        script.onload = done;
        script.onerror = failed;
        this.frame.contentDocument.body.append(script);
      });
    }
    tell(data) {
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", {data}));
    }
    postMessage(data) {
      this.ready ? this.tell(data) : this.waiting.push(data);
    }
    terminate() {
      this.frame.remove();
    }
  };
}
