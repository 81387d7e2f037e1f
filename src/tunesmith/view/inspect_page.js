"use strict";
// The filters hide cards; the address keeps them, so that what one sees can be passed on.
(() => {
  const form = document.querySelector(".filters");
  const cards = [...document.querySelectorAll("#cards > article")];
  const texts = new Map();
  const told = document.getElementById("told");
  const NAMES = ["kind", "data", "set", "text"];

  const textOf = (card) => {
    if (!texts.has(card)) texts.set(card, card.textContent.toLowerCase());
    return texts.get(card);
  };
  const asked = () => Object.fromEntries(NAMES.map((name) => [name, form.elements[name]?.value ?? ""]));
  const fits = (card, { kind, data, set, text }) =>
    (!kind || card.dataset.kinds.split(" ").includes(kind)) &&
    (!data || card.dataset.data === data) &&
    (!set || card.dataset.set === set) &&
    (!text || textOf(card).includes(text.toLowerCase()));

  const apply = () => {
    const filters = asked();
    let count = 0;
    for (const card of cards) {
      card.hidden = !fits(card, filters);
      count += !card.hidden;
    }
    form.querySelector("output").value = `${count} of ${cards.length}`;
    document.querySelector(".nothing").hidden = count > 0;
    return filters;
  };
  const keep = () => {
    const chosen = Object.entries(apply()).filter(([, value]) => value);
    history.replaceState(null, "", `#${new URLSearchParams(chosen)}`);
  };
  const restore = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const name of NAMES) if (form.elements[name]) form.elements[name].value = given.get(name) ?? "";
    apply();
  };
  const move = (by) => {
    const seen = cards.filter((card) => !card.hidden);
    const at = seen.indexOf(document.activeElement.closest("article"));
    seen[Math.min(Math.max(at + by, 0), seen.length - 1)]?.focus();
  };
  const tell = (token) => {
    document.querySelector(".told")?.classList.remove("told");
    token?.classList.add("told");
    told.hidden = !token;
    told.textContent = token ? `token ${token.title}` : "";
  };

  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", keep);
  addEventListener("hashchange", restore);
  document.addEventListener("click", (event) => tell(event.target.closest("i[title]")));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") {
      tell(null);
      document.activeElement.blur();
    } else if (!event.target.matches("input[type=search], select")) {
      if (event.key === "/") {
        event.preventDefault();
        form.elements.text.focus();
      } else if (event.key === "j" || event.key === "k") move(event.key === "j" ? 1 : -1);
    }
  });
  restore();
})();
