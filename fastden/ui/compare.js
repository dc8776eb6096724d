// <fastden-compare before="URL" after="URL">: two pictures of one size, one over the other, and a slider between them.
// Opens at 100 %: one pixel of the picture is one pixel of the screen. The picture is moved by dragging or scrolling.

const STYLE = `
  :host { display: block; contain: inline-size; --line: 50%; }
  .frame { margin: 0 auto; max-width: 100%; min-width: min(100%, 280px); }
  .view { position: relative; border-radius: 8px; overflow: hidden; background: #1114; }
  .scroll { overflow: auto; max-height: min(70vh, 900px); cursor: grab; }
  .scroll:active { cursor: grabbing; }
  .pair { position: relative; margin: 0 auto; }
  img { display: block; width: 100%; user-select: none; -webkit-user-drag: none; }
  .true img { image-rendering: pixelated; }
  .after { position: absolute; inset: 0; }
  .line { position: absolute; top: 0; bottom: 0; left: var(--line); width: 2px; margin-left: -1px; background: #fff;
    box-shadow: 0 0 4px #000a; pointer-events: none; }
  .tag { position: absolute; bottom: 10px; padding: 3px 9px; border-radius: 99px; background: #000a; color: #fff;
    font: 13px system-ui, sans-serif; pointer-events: none; }
  .left { left: 10px; } .right { right: 10px; }
  .bar { display: flex; align-items: center; gap: 12px; margin-top: 6px; }
  input { flex: 1; min-width: 0; height: 32px; margin: 0; accent-color: #2563eb; cursor: ew-resize; }
  button { font: 14px system-ui, sans-serif; padding: 6px 12px; border-radius: 8px; border: 1px solid #8888;
    background: transparent; color: inherit; cursor: pointer; white-space: nowrap; }
`;

const FORM = `
  <style>${STYLE}</style>
  <div class="frame">
    <div class="view">
      <div class="scroll"><div class="pair">
        <img class="before" alt="before"><img class="after" alt="after">
      </div></div>
      <div class="line"></div><span class="tag left">before</span><span class="tag right">after</span>
    </div>
    <div class="bar">
      <input type="range" min="0" max="100" step="0.1" value="50" aria-label="before and after">
      <button type="button"></button>
    </div>
  </div>
`;

class Compare extends HTMLElement {
  static observedAttributes = ["before", "after"];

  constructor() {
    super();
    this.attachShadow({ mode: "open" }).innerHTML = FORM;
    const find = (name) => this.shadowRoot.querySelector(name);
    [this.before, this.after, this.scroller] = [find(".before"), find(".after"), find(".scroll")];
    [this.pair, this.range, this.button] = [find(".pair"), find("input"), find("button")];
    this.frame = find(".frame");
    this.whole = false;
    this.range.addEventListener("input", () => this.draw());
    this.scroller.addEventListener("scroll", () => this.draw());
    this.button.addEventListener("click", () => { this.whole = !this.whole; this.fit(); });
    this.before.addEventListener("load", () => { this.fit(); this.centre(); });
    this.scroller.addEventListener("pointerdown", (event) => this.drag(event));
    this.resized = new ResizeObserver(() => this.fit());
  }

  connectedCallback() { this.resized.observe(this); }
  disconnectedCallback() { this.resized.disconnect(); }
  attributeChangedCallback(name, _, value) { this[name].src = value ?? ""; }

  // The width of the pair: that of the place it has, or the picture's own.
  fit() {
    const own = this.before.naturalWidth / devicePixelRatio;
    this.frame.style.width = `${own}px`;
    this.pair.style.width = this.whole ? "100%" : `${own}px`;
    this.pair.classList.toggle("true", !this.whole);
    this.button.textContent = this.whole ? "100 %" : "Whole picture";
    this.button.hidden = own <= this.clientWidth;
    this.draw();
  }

  centre() {
    this.scroller.scrollLeft = (this.scroller.scrollWidth - this.scroller.clientWidth) / 2;
    this.scroller.scrollTop = (this.scroller.scrollHeight - this.scroller.clientHeight) / 2;
    this.draw();
  }

  // The line stands still while the picture moves below it.
  draw() {
    const x = (this.range.value / 100) * this.scroller.clientWidth;
    const cut = x - (this.pair.getBoundingClientRect().left - this.scroller.getBoundingClientRect().left);
    this.style.setProperty("--line", `${x}px`);
    this.after.style.clipPath = `inset(0 0 0 ${Math.max(cut, 0)}px)`;
  }

  drag(event) {
    if (event.pointerType !== "mouse" || event.button !== 0) return;
    const { scroller } = this;
    const [x, y, left, top] = [event.clientX, event.clientY, scroller.scrollLeft, scroller.scrollTop];
    const move = (now) => scroller.scrollTo(left + x - now.clientX, top + y - now.clientY);
    addEventListener("pointermove", move);
    addEventListener("pointerup", () => removeEventListener("pointermove", move), { once: true });
    event.preventDefault();
  }
}

if (!customElements.get("fastden-compare")) customElements.define("fastden-compare", Compare);
