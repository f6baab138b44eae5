(function () {
  "use strict";
  var root = document.documentElement;
  var button = document.getElementById("theme");
  var system = window.matchMedia("(prefers-color-scheme: dark)");
  function isDark() { return root.dataset.theme ? root.dataset.theme === "dark" : system.matches; }
  function label() { button.textContent = isDark() ? "Light" : "Dark"; }
  button.hidden = false;
  button.addEventListener("click", function () { root.dataset.theme = isDark() ? "light" : "dark"; label(); });
  system.addEventListener("change", label);
  label();
  document.querySelectorAll(".needs-script").forEach(function (e) { e.hidden = false; });

  // The section being read is marked in the contents.
  var links = {};
  document.querySelectorAll("#contents a").forEach(function (a) { links[a.hash.slice(1)] = a; });
  var watcher = new IntersectionObserver(function (entries) {
    entries.forEach(function (e) {
      if (!e.isIntersecting) { return; }
      Object.values(links).forEach(function (a) { a.removeAttribute("aria-current"); });
      links[e.target.id].setAttribute("aria-current", "true");
    });
  }, { rootMargin: "-15% 0px -75% 0px" });
  Object.keys(links).forEach(function (id) { watcher.observe(document.getElementById(id)); });

  // Points show their image and their row.
  var card = document.getElementById("card");
  var tile = card.querySelector(".tile");
  var list = card.querySelector("dl");
  var current = null;
  function hide() {
    if (current) { current.classList.remove("on"); }
    current = null;
    card.hidden = true;
  }
  function show(point, panel, data) {
    hide();
    current = point;
    point.classList.add("on");
    var row = Number(point.dataset.row);
    list.textContent = "";
    data.columns.forEach(function (name, i) {
      list.appendChild(document.createElement("dt")).textContent = name;
      list.appendChild(document.createElement("dd")).textContent = data.rows[row][i];
    });
    var style = getComputedStyle(panel).getPropertyValue("--tile");
    tile.hidden = !style;
    if (style) {
      var across = data.across, x = row % across, y = Math.floor(row / across);
      tile.style.backgroundImage = style;
      tile.style.backgroundSize = across * 100 + "% " + data.down * 100 + "%";
      tile.style.backgroundPosition =
        (across > 1 ? x / (across - 1) * 100 : 0) + "% " + (data.down > 1 ? y / (data.down - 1) * 100 : 0) + "%";
    }
    card.hidden = false;
    place();
    point.setAttribute("aria-label", data.columns.map(function (n, i) { return n + " " + data.rows[row][i]; }).join(", "));
  }
  function place() {
    if (!current) { return; }
    var at = current.getBoundingClientRect(), own = card.getBoundingClientRect();
    var left = at.right + 12, top = at.top - own.height / 2;
    if (left + own.width > innerWidth - 8) { left = at.left - own.width - 12; }
    card.style.left = Math.max(8, Math.min(left, innerWidth - own.width - 8)) + "px";
    card.style.top = Math.max(8, Math.min(top, innerHeight - own.height - 8)) + "px";
  }
  // The nearest point in the direction of an arrow key; sideways counts double.
  function next(points, from, dx, dy) {
    var best = null, least = Infinity, fx = +from.getAttribute("x"), fy = +from.getAttribute("y");
    points.forEach(function (p) {
      var x = p.getAttribute("x") - fx, y = p.getAttribute("y") - fy;
      var ahead = x * dx + y * dy, aside = Math.abs(x * dy) + Math.abs(y * dx);
      if (p !== from && ahead > 0 && ahead + 2 * aside < least) { least = ahead + 2 * aside; best = p; }
    });
    return best;
  }
  var arrows = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  document.querySelectorAll(".points-panel").forEach(function (panel) {
    var data = JSON.parse(panel.querySelector("script").textContent);
    var points = Array.from(panel.querySelectorAll(".points use"));
    if (!points.length) { return; }
    panel.querySelector("svg").setAttribute("role", "group");
    points.forEach(function (p) { p.setAttribute("tabindex", "-1"); p.setAttribute("role", "img"); });
    points[0].setAttribute("tabindex", "0");
    points[0].setAttribute("aria-label", "point; arrow keys move between points");
    // Listeners sit on the panel: an SVG group that listens for focus would become a stop of its own.
    function point(e) { return e.target.closest(".points use"); }
    function open(e) { if (point(e)) { show(point(e), panel, data); } }
    panel.addEventListener("mouseover", open);
    panel.addEventListener("click", open);
    panel.addEventListener("focusin", open);
    panel.addEventListener("mouseout", hide);
    panel.addEventListener("focusout", hide);
    panel.addEventListener("keydown", function (e) {
      if (e.key === "Escape") { hide(); return; }
      if (!arrows[e.key] || !point(e)) { return; }
      e.preventDefault();
      var to = next(points, point(e), arrows[e.key][0], arrows[e.key][1]);
      if (to) { point(e).setAttribute("tabindex", "-1"); to.setAttribute("tabindex", "0"); to.focus(); }
    });
  });
  addEventListener("scroll", place, { passive: true });
  addEventListener("resize", place);
})();
