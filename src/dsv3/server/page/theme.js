// Light or dark, set before the first paint, which modules would come too late for.
// Without a choice kept here, style.css follows the system (prefers-color-scheme).
try {
  const theme = localStorage.getItem("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // A browser that gives no storage: the system's colours it is.
}
