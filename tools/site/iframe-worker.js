// From disk, browsers start no Worker. Material's search then runs in a frame:
// what it posts becomes a message of this object, and the other way round.
if (location.protocol === 'file:') {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement('iframe')
      frame.hidden = true
      document.body.append(frame)
      const inside = (this.window = frame.contentWindow)
      inside.postMessage = (data) =>
        this.dispatchEvent(new MessageEvent('message', { data }))
      inside.importScripts = (...urls) =>
        urls.reduce((done, each) => done.then(() => load(each)), Promise.resolve())
      const load = (each) =>
        new Promise((done, failed) => {
          const script = inside.document.createElement('script')
          Object.assign(script, { src: each, onload: done, onerror: failed })
          inside.document.body.append(script)
        })
      this.ready = load(url)
    }
    postMessage(data) {
      this.ready.then(() =>
        this.window.dispatchEvent(new MessageEvent('message', { data })))
    }
  }
}
