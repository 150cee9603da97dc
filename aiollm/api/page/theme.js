// Before the first paint: the colours that were chosen earlier.
try {
  const theme = localStorage.getItem("aiollm.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is switched off: the system's colours.
}
