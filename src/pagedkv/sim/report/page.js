"use strict";
// Points speak when a pointer comes near them; without this script their titles do.
(() => {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);
  const hide = () => { tip.className = ""; };
  const spots = (chart) => {
    if (!chart.spots) {
      chart.spots = [...chart.querySelectorAll(".dot, .bar")].map((shape) => {
        const title = shape.querySelector("title");
        const words = title ? title.textContent : "";
        if (title) { title.remove(); }
        shape.setAttribute("aria-label", words);
        return { shape, words };
      });
    }
    return chart.spots;
  };
  const distance = (box, event, isBar) => {
    const across = Math.max(box.left - event.clientX, 0, event.clientX - box.right);
    const down = Math.max(box.top - event.clientY, 0, event.clientY - box.bottom);
    return isBar ? across + down / 50 : Math.hypot(across, down);
  };
  const show = (chart, event) => {
    let best = null;
    let least = 28;
    for (const spot of spots(chart)) {
      const far = distance(spot.shape.getBoundingClientRect(), event, spot.shape.classList.contains("bar"));
      if (least > far) { best = spot; least = far; }
    }
    for (const spot of spots(chart)) { spot.shape.classList.toggle("near", spot === best); }
    if (!best) { hide(); return; }
    tip.textContent = best.words;
    tip.className = "shown";
    const box = best.shape.getBoundingClientRect();
    const left = Math.min(box.left + 10, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.transform = "translate(" + Math.max(left, 8) + "px," + (above > 4 ? above : box.bottom + 8) + "px)";
  };
  for (const chart of document.querySelectorAll("svg.chart")) {
    chart.addEventListener("pointermove", (event) => show(chart, event));
    chart.addEventListener("pointerdown", (event) => show(chart, event));
    chart.addEventListener("pointerleave", () => {
      hide();
      for (const spot of spots(chart)) { spot.shape.classList.remove("near"); }
    });
  }
  window.addEventListener("scroll", hide, { passive: true });
})();
// The heads of tables sort.
(() => {
  const value = (row, column) => {
    const cell = row.cells[column];
    const number = cell.dataset.value;
    return number === undefined ? cell.textContent : Number(number);
  };
  const order = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b));
  for (const head of document.querySelectorAll("thead th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const body = head.closest("table").tBodies[0];
      const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => sign * order(value(a, head.cellIndex), value(b, head.cellIndex)));
      for (const other of head.parentNode.cells) { other.removeAttribute("aria-sort"); }
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      body.append(...rows);
    });
  }
})();
// Paper cannot unfold.
window.addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details")) { fold.open = true; }
});
