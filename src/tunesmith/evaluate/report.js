"use strict";
// The links above the samples sort them; the address keeps the order, so that it can be passed on.
(() => {
  const list = document.getElementById("samples");
  const nav = document.getElementById("orders");
  const byRank = (sign) => (a, b) => {
    const [x, y] = [a.dataset.rank, b.dataset.rank];
    // Samples without a score come last in either direction.
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (x - y);
  };
  const orders = new Map([
    ["gained", byRank(1)],
    ["lost", byRank(-1)],
    ["in-order", (a, b) => a.dataset.id - b.dataset.id],
  ]);

  const sort = () => {
    const asked = location.hash.slice(1);
    const name = orders.has(asked) ? asked : "gained";
    list.append(...[...list.children].sort(orders.get(name)));
    for (const link of nav.children) {
      if (link.hash.slice(1) === name) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  };
  nav.hidden = false;
  addEventListener("hashchange", sort);
  sort();
})();
