"use strict";
// The page works without this script, except for the gallery and the buttons.

(function chooseTheme() {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const names = { auto: "Theme: auto", light: "Theme: light", dark: "Theme: dark" };
  const order = ["auto", "light", "dark"];
  // Pages opened as files may be kept from storing anything.
  const recall = () => {
    try { return localStorage.getItem("retinaray-theme"); } catch { return null; }
  };
  const keep = (theme) => {
    try { localStorage.setItem("retinaray-theme", theme); } catch { return; }
  };
  const show = (theme) => {
    root.dataset.theme = theme;
    button.textContent = names[theme];
  };
  const recalled = recall();
  show(order.includes(recalled) ? recalled : "auto");
  button.hidden = false;
  button.addEventListener("click", () => {
    const next = order[(order.indexOf(root.dataset.theme) + 1) % order.length];
    show(next);
    keep(next);
  });
})();

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const text = button.parentElement.querySelector("pre");
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      // Without access to the clipboard the text is at least selected.
      getSelection().selectAllChildren(text);
      button.textContent = "Selected";
    }
  });
}

(function showGallery() {
  const source = document.getElementById("gallery-data");
  if (!source) return;
  const { runs, pictures } = JSON.parse(source.textContent);
  const SVG = "http://www.w3.org/2000/svg";
  // By the numbers of `VERDICTS` in gallery.py: how a box is drawn, and what its label says.
  const KINDS = ["hit", "confused", "false", "false", "duplicate", "false", "ignored"];
  const WORDS = ["", "wrong class", "poorly placed", "wrong class, poorly placed", "second", "background", "ignored"];
  const GROUP_NAMES = { best: "best", worst: "worst", confused: "most confused", random: "random" };
  const byId = (id) => document.getElementById(id);
  const grid = byId("grid");
  const slider = byId("threshold");
  const dialog = byId("viewer");
  const frame = dialog.querySelector(".frame");
  const ZOOM_STEP = 1.5;
  const MAX_ZOOM = 16;
  // `threshold` is null while each class has the run's own.
  const state = { run: 0, group: "all", threshold: null, shown: [], current: 0, viewed: -1, zoom: 1 };

  const limitOf = (label) =>
    state.threshold === null ? runs[state.run].thresholds[label] : state.threshold;
  const viewOf = (index) => pictures[index].views[state.run];
  const addressOf = (index) =>
    "data:image/webp;base64," + byId(`picture-${index}`).textContent;

  function select(index) {
    const view = viewOf(index);
    const found = view.found.filter((box) => box[4] > limitOf(box[5]));
    const missed = view.truth.filter((box) => box[4] <= limitOf(box[5]));
    const hits = found.filter((box) => box[6] === 0).length;
    const wrong = found.filter((box) => !["hit", "ignored"].includes(KINDS[box[6]])).length;
    return { found, missed, hits, wrong };
  }

  function describe(chosen) {
    return `${chosen.hits} hit, ${chosen.wrong} false, ${chosen.missed.length} missed`;
  }

  function addBox(svg, box, kind) {
    for (const name of ["halo", kind]) {
      const rect = document.createElementNS(SVG, "rect");
      const values = { x: box[0], y: box[1], width: box[2], height: box[3], class: name };
      for (const [key, value] of Object.entries(values)) rect.setAttribute(key, value);
      svg.append(rect);
    }
  }

  function drawBoxes(svg, chosen) {
    svg.replaceChildren();
    for (const box of chosen.missed) addBox(svg, box, "missed");
    for (const box of chosen.found) addBox(svg, box, KINDS[box[6]]);
  }

  function drawCard(card) {
    const index = Number(card.dataset.index);
    const chosen = select(index);
    const image = card.querySelector("img");
    if (!image.src) image.src = addressOf(index);
    drawBoxes(card.querySelector("svg"), chosen);
    card.querySelector(".counts").textContent = describe(chosen);
    const name = pictures[index].name;
    card.setAttribute("aria-label", `${name}: ${describe(chosen)}; enlarge`);
  }

  const seen = new Set();
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        seen.add(entry.target);
        drawCard(entry.target);
      } else {
        seen.delete(entry.target);
        entry.target.querySelector("svg").replaceChildren();
      }
    }
  }, { rootMargin: "300px" });

  function makeElement(tag, className, text) {
    const element = document.createElement(tag);
    element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function makeFrame(index) {
    const { width, height } = pictures[index];
    const made = makeElement("span", "frame");
    const image = document.createElement("img");
    image.alt = "";
    image.decoding = "async";
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("aria-hidden", "true");
    made.append(image, svg);
    return made;
  }

  function makeCard(index, place) {
    const card = makeElement("button", "card");
    card.type = "button";
    card.dataset.index = index;
    card.tabIndex = place === 0 ? 0 : -1;
    const caption = makeElement("span", "caption");
    const groups = viewOf(index).groups;
    const note = state.group === "all"
      ? Object.keys(groups).map((key) => GROUP_NAMES[key]).join(", ")
      : groups[state.group];
    caption.append(
      makeElement("b", "", pictures[index].name),
      makeElement("span", "counts", describe(select(index))),
      makeElement("small", "note", note ? ` · ${note}` : ""),
    );
    card.append(makeFrame(index), caption);
    card.setAttribute("aria-label", `${pictures[index].name}: ${describe(select(index))}; enlarge`);
    card.addEventListener("click", () => openViewer(place));
    return card;
  }

  function listShown() {
    const all = pictures.map((_, index) => index).filter((index) => viewOf(index));
    if (state.group === "all") return all;
    return all.filter((index) => state.group in viewOf(index).groups);
  }

  function fillGrid() {
    watcher.disconnect();
    seen.clear();
    state.shown = listShown();
    state.current = 0;
    grid.replaceChildren(...state.shown.map(makeCard));
    for (const card of grid.children) watcher.observe(card);
    byId("gallery-count").textContent = `${state.shown.length} of ${pictures.length} images`;
    for (const button of document.querySelectorAll("[data-group]")) {
      button.setAttribute("aria-pressed", String(button.dataset.group === state.group));
    }
  }

  function showThreshold() {
    const own = runs[state.run].thresholds;
    const low = Math.min(...own).toFixed(2);
    const high = Math.max(...own).toFixed(2);
    const range = low === high ? low : `${low} to ${high}`;
    const text = state.threshold === null ? `${range} (own)` : state.threshold.toFixed(2);
    byId("threshold-value").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    if (state.threshold === null) slider.value = own.reduce((a, b) => a + b, 0) / own.length;
    byId("own-thresholds").setAttribute("aria-pressed", String(state.threshold === null));
  }

  let isDue = false;
  function redraw() {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => {
      isDue = false;
      showThreshold();
      for (const card of seen) drawCard(card);
      if (dialog.open) drawViewer();
    });
  }

  function countColumns() {
    return getComputedStyle(grid).gridTemplateColumns.split(" ").length;
  }

  function moveTo(place) {
    const last = state.shown.length - 1;
    if (last < 0) return;
    const target = Math.min(Math.max(place, 0), last);
    grid.children[Math.min(state.current, last)].tabIndex = -1;
    state.current = target;
    grid.children[target].tabIndex = 0;
    grid.children[target].focus();
  }

  grid.addEventListener("keydown", (event) => {
    const steps = {
      ArrowRight: 1, ArrowLeft: -1, ArrowDown: countColumns(), ArrowUp: -countColumns(),
      Home: -state.shown.length, End: state.shown.length,
    };
    if (!(event.key in steps)) return;
    event.preventDefault();
    moveTo(state.current + steps[event.key]);
  });
  grid.addEventListener("focusin", (event) => {
    const place = [...grid.children].indexOf(event.target);
    if (place >= 0) state.current = place;
  });

  function drawViewer() {
    const index = state.shown[state.viewed];
    const picture = pictures[index];
    const chosen = select(index);
    dialog.querySelector("img").src = addressOf(index);
    dialog.querySelector("img").alt = `${picture.name}: ${describe(chosen)}`;
    drawShapes(chosen);
    const note = viewOf(index).groups[state.group];
    byId("viewer-title").textContent = `${state.viewed + 1} of ${state.shown.length}: ${picture.name}`;
    byId("viewer-note").textContent =
      [describe(chosen), note, runs.length > 1 ? `boxes of ${runs[state.run].name}` : ""]
        .filter(Boolean).join(" · ");
  }

  // Boxes with labels that are as large on the screen at any zoom.
  function drawShapes(chosen) {
    const picture = pictures[state.shown[state.viewed]];
    const svg = dialog.querySelector("svg");
    svg.setAttribute("viewBox", `0 0 ${picture.width} ${picture.height}`);
    drawBoxes(svg, chosen);
    const { classes } = runs[state.run];
    // On a small screen only numbers have room.
    const isNarrow = dialog.clientWidth < 600;
    const place = svg.getBoundingClientRect();
    const scale = Math.max(picture.width / place.width, picture.height / place.height);
    const size = 13 * scale;
    const write = (box, text) => {
      const label = document.createElementNS(SVG, "text");
      label.setAttribute("x", Math.min(box[0] + 2 * scale, picture.width - size));
      label.setAttribute("y", box[1] > 1.3 * size ? box[1] - 4 * scale : box[1] + 1.2 * size);
      label.setAttribute("font-size", size);
      label.setAttribute("stroke-width", 3.5 * scale);
      label.textContent = text;
      svg.append(label);
    };
    for (const box of chosen.missed) write(box, isNarrow ? "–" : `${classes[box[5]]} missed`);
    for (const box of chosen.found) {
      const score = box[4].toFixed(2);
      const words = [`${classes[box[5]]} ${score}`, WORDS[box[6]]].filter(Boolean).join(", ");
      write(box, isNarrow ? score : words);
    }
  }

  // The point of the frame at `at`, in px from its corner, keeps its place; by default the middle.
  function setZoom(zoom, at) {
    const { x, y } = at ?? { x: frame.clientWidth / 2, y: frame.clientHeight / 2 };
    const wanted = Math.min(Math.max(zoom, 1), MAX_ZOOM);
    if (wanted === state.zoom) return;
    const across = (frame.scrollLeft + x) / frame.scrollWidth;
    const down = (frame.scrollTop + y) / frame.scrollHeight;
    showZoom(wanted);
    const left = across * frame.scrollWidth - x;
    const top = down * frame.scrollHeight - y;
    frame.scrollTo({ left, top, behavior: "instant" });
    drawShapes(select(state.shown[state.viewed]));
  }

  function showZoom(zoom) {
    state.zoom = zoom;
    frame.style.setProperty("--zoom", zoom);
    frame.classList.toggle("zoomed", zoom > 1);
    byId("zoom").textContent = `${Math.round(100 * zoom)} %`;
    // Not `disabled`: that would take the focus out of the dialog.
    byId("zoom-out").setAttribute("aria-disabled", zoom === 1);
    byId("zoom-in").setAttribute("aria-disabled", zoom === MAX_ZOOM);
  }

  function placeIn(event) {
    const corner = frame.getBoundingClientRect();
    return { x: event.clientX - corner.left, y: event.clientY - corner.top };
  }

  function openViewer(place) {
    state.viewed = place;
    if (!dialog.open) dialog.showModal();
    showZoom(1);
    drawViewer();
  }

  function turn(step) {
    const count = state.shown.length;
    openViewer((state.viewed + step + count) % count);
  }

  dialog.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    // Enlarged, the arrows move the image.
    if (event.key.startsWith("Arrow") && state.zoom > 1) {
      const step = { ArrowRight: [60, 0], ArrowLeft: [-60, 0], ArrowDown: [0, 60], ArrowUp: [0, -60] };
      frame.scrollBy(...step[event.key]);
    } else if (event.key === "ArrowRight") turn(1);
    else if (event.key === "ArrowLeft") turn(-1);
    else if (event.key === "+" || event.key === "=") setZoom(state.zoom * ZOOM_STEP);
    else if (event.key === "-") setZoom(state.zoom / ZOOM_STEP);
    else if (event.key === "0") setZoom(1);
    else return;
    event.preventDefault();
  });
  frame.addEventListener("click", (event) => setZoom(state.zoom > 1 ? 1 : 4, placeIn(event)));
  frame.addEventListener("wheel", (event) => {
    event.preventDefault();
    // Lines and pages in px; a notch of a mouse is about 100 px, a trackpad sends many small steps.
    const px = event.deltaY * [1, 33, 800][event.deltaMode];
    setZoom(state.zoom * ZOOM_STEP ** (-px / 100), placeIn(event));
  }, { passive: false });
  byId("zoom-in").addEventListener("click", () => setZoom(state.zoom * ZOOM_STEP));
  byId("zoom-out").addEventListener("click", () => setZoom(state.zoom / ZOOM_STEP));
  dialog.addEventListener("close", () => moveTo(state.viewed));
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  byId("close").addEventListener("click", () => dialog.close());
  addEventListener("resize", () => { if (dialog.open) drawViewer(); });

  for (const button of document.querySelectorAll("[data-group]")) {
    button.addEventListener("click", () => {
      state.group = button.dataset.group;
      fillGrid();
    });
  }
  byId("run").addEventListener("change", (event) => {
    state.run = Number(event.target.value);
    fillGrid();
    redraw();
  });
  slider.addEventListener("input", () => {
    state.threshold = Number(slider.value);
    redraw();
  });
  byId("own-thresholds").addEventListener("click", () => {
    state.threshold = null;
    redraw();
  });
  byId("gallery-body").hidden = false;
  showThreshold();
  fillGrid();
})();
