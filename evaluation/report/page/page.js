"use strict";
(() => {
  const data = JSON.parse(document.getElementById("pairs-data").textContent);
  const STEP = 4;  // per cent of the width that an arrow key moves the split
  const CLICK = 4;  // pixels that a pointer may move and still have clicked
  const FIRST = 20;  // pairs shown before "Show all" is asked for
  const LARGEST = 24;  // times the size that fits the screen
  const GRIP = 22;  // pixels around the split within which an enlarged image is not moved but compared
  const PIXELATED = 4;  // screen pixels an image pixel, from which on pixels are shown as squares
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  // ---- a before/after slider: full precision left of the split, the recipe right of it

  class Slider {
    constructor(frame) {
      this.frame = frame;
      this.range = Object.assign(document.createElement("input"), { type: "range", min: 0, max: 100, step: STEP / 2 });
      this.range.setAttribute("aria-label", `Compare ${data.reference} with the recipe; Enter opens the large view`);
      frame.append(this.range);
      this.range.addEventListener("input", () => this.set(Number(this.range.value)));
      this.layers = all(".layer", frame);
      for (const layer of this.layers) {
        layer.tabIndex = -1;
        layer.draggable = false;
        layer.addEventListener("click", (event) => event.preventDefault());
        layer.addEventListener("dragstart", (event) => event.preventDefault());
      }
      this.set(50);
    }

    set(split) {
      this.split = clamp(split, 0, 100);
      this.range.value = this.split;
      this.frame.style.setProperty("--split", `${this.split}%`);
    }

    setAt(x) {
      const box = this.frame.getBoundingClientRect();
      this.set(((x - box.left) / box.width) * 100);
    }

    show(recipe) {
      for (const layer of this.layers) {
        const reference = layer.dataset.name === data.reference;
        layer.classList.toggle("over", layer.dataset.name === recipe && !reference);
        layer.classList.toggle("away", layer.dataset.name !== recipe && !reference);
      }
    }
  }

  /** Tell `moved` of a drag on `element` (x and y since the last event), and `clicked` of a press that did not move. */
  function onDrag(element, { pressed = () => {}, moved, clicked }) {
    let last = null;
    let far = false;
    element.addEventListener("mousedown", (event) => event.preventDefault());  // would move the focus
    element.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !event.isPrimary) return;
      last = event;
      far = false;
      pressed(event);
    });
    element.addEventListener("pointermove", (event) => {
      if (!last || event.pointerId !== last.pointerId) return;
      if (!far && Math.hypot(event.clientX - last.clientX, event.clientY - last.clientY) < CLICK) return;
      if (!far) element.setPointerCapture(event.pointerId);
      far = true;
      moved(event, event.clientX - last.clientX, event.clientY - last.clientY);
      last = event;
    });
    element.addEventListener("pointerup", (event) => {
      if (last && !far && event.pointerId === last.pointerId) clicked(event);
      last = null;
    });
    element.addEventListener("pointercancel", () => { last = null; });
  }

  // ---- the pairs: recipe, order, filter

  const place = document.querySelector(".pairs");
  const pairs = all(".pair").map((figure, index) => ({
    figure,
    index,
    number: Number(figure.dataset.number),
    prompt: figure.querySelector(".prompt").textContent,
    slider: new Slider(figure.querySelector(".frame")),
  }));
  const sort = document.getElementById("sort");
  const find = document.getElementById("find");
  const more = document.getElementById("more");
  const choices = all("select.recipe");
  let recipe = choices[0].value;
  let listed = pairs;

  const value = (pair, key) => data.values[recipe][key]?.[pair.index] ?? null;

  function text(pair, key) {
    const { title, unit, decimals, digits } = data.sorts[key];
    const number = value(pair, key);
    if (number === null) return "";
    return `${title} ${digits ? number.toPrecision(digits) : number.toFixed(decimals)}${unit}`;
  }

  function worstFirst(key) {
    const sign = data.sorts[key].worse === "higher" ? -1 : 1;
    return (a, b) => {
      const [first, second] = [value(a, key), value(b, key)];
      if (first === null || second === null) return (first === null) - (second === null) || a.number - b.number;
      return sign * (first - second) || a.number - b.number;
    };
  }

  function list() {
    const wanted = find.value.trim().toLowerCase();
    const byNumber = sort.value === "number";
    const key = byNumber ? "difference" : sort.value;
    const order = byNumber ? (a, b) => a.number - b.number : worstFirst(key);
    listed = pairs.filter((pair) => pair.prompt.toLowerCase().includes(wanted)).sort(order);
    const shown = new Set(more.hidden ? listed : listed.slice(0, FIRST));
    for (const pair of pairs) pair.figure.hidden = !shown.has(pair);
    for (const pair of pairs) pair.figure.querySelector(".value").textContent = text(pair, key);
    place.append(...listed.map((pair) => pair.figure));
    document.getElementById("count").textContent =
      listed.length === pairs.length ? `${pairs.length} pairs` : `${listed.length} of ${pairs.length} pairs`;
  }

  function choose(name) {
    recipe = name;
    for (const choice of choices) choice.value = name;
    for (const pair of pairs) pair.slider.show(name);
    for (const part of all(".of-recipe")) part.classList.toggle("away", part.dataset.name !== name);
    const kept = sort.value || "difference";
    const keys = Object.keys(data.sorts).filter((key) => key in data.values[name]);
    sort.replaceChildren(
      ...keys.map((key) => new Option(`${data.sorts[key].title}, worst first`, key)),
      new Option("Number", "number"),
    );
    sort.value = keys.includes(kept) || kept === "number" ? kept : "difference";
    list();
  }

  for (const pair of pairs) {
    const { slider } = pair;
    onDrag(slider.frame, {
      pressed: () => slider.range.focus({ preventScroll: true }),
      moved: (event) => slider.setAt(event.clientX),
      clicked: () => view.open(pair),
    });
    slider.range.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      view.open(pair);
    });
  }
  function showAll() {
    more.hidden = true;
    list();
  }

  more.hidden = pairs.length <= FIRST;
  more.addEventListener("click", showAll);
  sort.addEventListener("change", list);
  find.addEventListener("input", list);
  for (const choice of choices) choice.addEventListener("change", () => choose(choice.value));

  // ---- the large view

  const view = {
    dialog: document.getElementById("zoom"),
    stage: document.querySelector("#zoom .stage"),

    open(pair) {
      this.show(pair);
      if (!this.dialog.open) {
        this.dialog.showModal();
        this.fit();
      }
      this.slider.range.focus();
    },

    show(pair) {
      this.pair = pair;
      const frame = pair.slider.frame.cloneNode(true);
      frame.querySelector("input").remove();
      for (const image of all("img", frame)) image.loading = "eager";
      this.stage.replaceChildren(frame);
      this.slider = new Slider(frame);
      this.slider.set(pair.slider.split);
      this.slider.show(recipe);
      let sliding = true;
      onDrag(frame, {
        pressed: (event) => {
          const box = frame.getBoundingClientRect();
          const split = box.left + (this.slider.split / 100) * box.width;
          sliding = this.scale === 1 || Math.abs(event.clientX - split) < GRIP;
        },
        moved: (event, x, y) => (sliding ? this.slider.setAt(event.clientX) : this.move(this.x + x, this.y + y)),
        clicked: (event) => (this.scale === 1 ? this.zoom(3, event.clientX, event.clientY) : this.fit()),
      });
      this.tell();
      this.fit();
    },

    tell() {
      const { pair } = this;
      const within = (selector) => this.dialog.querySelector(selector);
      within(".place").textContent = `${listed.indexOf(pair) + 1} of ${listed.length} · number ${pair.number} · ${recipe}`;
      within(".prompt").textContent = pair.prompt;
      const values = Object.keys(data.sorts).map((key) => text(pair, key)).filter(Boolean).join(" · ");
      const files = this.slider.layers.filter((layer) => !layer.classList.contains("away")).flatMap((layer) => {
        const link = Object.assign(document.createElement("a"), { href: layer.href, target: "_blank" });
        link.textContent = `file of ${layer.dataset.name}`;
        return [" · ", link];
      });
      within(".values").replaceChildren(values, ...files);
    },

    fit() {
      const { frame } = this.slider;
      const style = getComputedStyle(frame);
      const aspect = style.getPropertyValue("--width") / style.getPropertyValue("--height");
      const inside = getComputedStyle(this.stage);
      const width = this.stage.clientWidth - parseFloat(inside.paddingLeft) - parseFloat(inside.paddingRight);
      frame.style.setProperty("--fit", `${Math.floor(Math.min(width, this.stage.clientHeight * aspect))}px`);
      this.scale = 1;
      this.move(0, 0);
    },

    /** Enlarge by a factor around a point of the screen, by default the middle of the image. */
    zoom(factor, clientX = null, clientY = null) {
      const box = this.slider.frame.getBoundingClientRect();
      const [x, y] = [(clientX ?? box.left + box.width / 2) - box.left, (clientY ?? box.top + box.height / 2) - box.top];
      const before = this.scale;
      this.scale = clamp(before * factor, 1, LARGEST);
      const grown = this.scale / before;
      this.move(x - (x - this.x) * grown, y - (y - this.y) * grown);
    },

    move(x, y) {
      const { frame, layers } = this.slider;
      this.x = clamp(x, frame.clientWidth * (1 - this.scale), 0);
      this.y = clamp(y, frame.clientHeight * (1 - this.scale), 0);
      const transform = `translate(${this.x}px, ${this.y}px) scale(${this.scale})`;
      for (const layer of layers) layer.querySelector("img").style.transform = transform;
      const pixels = Number(getComputedStyle(frame).getPropertyValue("--width"));
      frame.classList.toggle("pixelated", (frame.clientWidth * this.scale) / pixels >= PIXELATED);
      frame.classList.toggle("enlarged", this.scale > 1);
    },

    step(by) {
      const next = listed[listed.indexOf(this.pair) + by];
      if (next) this.open(next);
    },

    /** What each button does, and the key of the same name. */
    actions: {
      previous: () => view.step(-1),
      next: () => view.step(1),
      in: () => view.zoom(1.5),
      out: () => view.zoom(1 / 1.5),
      fit: () => view.fit(),
      flip: () => view.slider.set(view.slider.split > 50 ? 0 : 100),
      close: () => view.dialog.close(),
    },
  };
  const KEYS = {
    ArrowLeft: "previous", ArrowRight: "next", "+": "in", "=": "in", "-": "out", 0: "fit", " ": "flip",
  };

  view.dialog.addEventListener("keydown", (event) => {
    const onButton = event.target.closest("button, a") && event.key === " ";
    if (!(event.key in KEYS) || onButton || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    view.actions[KEYS[event.key]]();
  });
  view.dialog.addEventListener("click", (event) => view.actions[event.target.dataset.do]?.());
  view.stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    view.zoom(Math.exp(-event.deltaY / 400), event.clientX, event.clientY);
  }, { passive: false });
  view.dialog.addEventListener("close", () => {
    if (view.pair.figure.hidden) showAll();
    view.pair.slider.range.focus({ preventScroll: true });
    view.pair.figure.scrollIntoView({ block: "nearest" });
  });
  addEventListener("resize", () => view.dialog.open && view.fit());

  // ---- charts: the point next to the pointer, or the one that the arrow keys have come to, says what it is

  for (const chart of all(".chart")) {
    const svg = chart.querySelector("svg");
    const points = all("circle", svg);
    const readout = chart.querySelector(".readout");
    let current = -1;

    const tell = (index) => {
      points[current]?.classList.remove("on");
      current = index;
      points[index].classList.add("on");
      readout.textContent = points[index].textContent;
    };
    svg.addEventListener("pointermove", (event) => {
      const away = points.map((point) => {
        const box = point.getBoundingClientRect();
        return Math.hypot(box.x + box.width / 2 - event.clientX, box.y + box.height / 2 - event.clientY);
      });
      tell(away.indexOf(Math.min(...away)));
    });
    svg.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      tell(clamp(current + by, 0, points.length - 1));
    });
  }

  choose(recipe);
})();
