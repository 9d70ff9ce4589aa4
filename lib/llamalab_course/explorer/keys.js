// Tells Python of Ctrl+Enter ("generate") and Esc ("stop") pressed inside the explorer.

function keyOf(event) {
  if (event.key === "Escape") return "stop";
  return event.key === "Enter" && (event.ctrlKey || event.metaKey) ? "generate" : null;
}

function render({ model, el }) {
  const pressed = event => {
    const inside = event.target.closest && event.target.closest(".llamalab-explorer");
    const key = keyOf(event);
    if (!inside || !key || !inside.contains(el)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    model.send({ key });
  };
  // Captured on the way down: before Jupyter, to which both keys mean something else.
  window.addEventListener("keydown", pressed, true);
  return () => window.removeEventListener("keydown", pressed, true);
}

export default { render };
