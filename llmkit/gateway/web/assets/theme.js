// Runs before the first paint: the theme that was chosen, or the system's.
'use strict';
(function () {
  let chosen = null;
  try { chosen = localStorage.getItem('llmkit-theme'); } catch (error) { /* stores nothing */ }
  if (chosen === 'light' || chosen === 'dark') document.documentElement.dataset.theme = chosen;
}());
