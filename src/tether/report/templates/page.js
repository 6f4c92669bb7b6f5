
"use strict";
// What a chart shows beside the pointer: places and texts come with the chart, and are set as text.
for (const chart of document.querySelectorAll(".chart")) {
  const svg = chart.querySelector(":scope > svg"), tip = chart.querySelector(".tip");
  const cross = svg.querySelector(".cross"), data = JSON.parse(chart.dataset.pointer);
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  const dots = data.s.map((_, at) => {
    const dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    const group = svg.querySelectorAll(".series, .bars")[at];
    dot.setAttribute("r", "3.5");
    dot.setAttribute("class", "pointed dot");
    (group || svg).appendChild(dot);
    return dot;
  });
  let at = -1;
  const hide = () => { at = -1; tip.hidden = true; chart.classList.remove("pointing"); };
  const show = (next) => {
    at = Math.max(0, Math.min(data.x.length - 1, next));
    const x = data.x[at], lines = [data.l[at]];
    cross.setAttribute("x1", x);
    cross.setAttribute("x2", x);
    data.s.forEach((line, place) => {
      const y = line.y[at];
      dots[place].setAttribute("visibility", y === null ? "hidden" : "visible");
      if (y === null) return;
      dots[place].setAttribute("cx", x);
      dots[place].setAttribute("cy", y);
      lines.push(data.s.length > 1 || line.n ? `${line.n}: ${line.t[at]}` : line.t[at]);
    });
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    chart.classList.add("pointing");
    const box = svg.getBoundingClientRect(), room = box.width - tip.offsetWidth;
    const left = x / width * box.width + (x > width / 2 ? -tip.offsetWidth - 10 : 10);
    tip.style.left = `${Math.max(0, Math.min(room, left))}px`;
    tip.style.top = `${box.top - chart.getBoundingClientRect().top + 8}px`;
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * width;
    let best = 0;
    data.x.forEach((place, index) => { if (Math.abs(place - x) < Math.abs(data.x[best] - x)) best = index; });
    show(best);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) { event.preventDefault(); show(at < 0 ? (step > 0 ? 0 : data.x.length - 1) : at + step); }
    if (event.key === "Escape") hide();
  });
}
// A page that is served while a run goes on is loaded again and again: what was unfolded stays so.
document.querySelectorAll("details").forEach((details, number) => {
  const key = `tether ${location.pathname} ${number}`;
  try {
    if (sessionStorage.getItem(key)) details.open = sessionStorage.getItem(key) === "open";
    details.addEventListener("toggle", () => sessionStorage.setItem(key, details.open ? "open" : "shut"));
  } catch (error) {
    // Pages read from a file may have no storage: nothing is remembered then.
  }
});
