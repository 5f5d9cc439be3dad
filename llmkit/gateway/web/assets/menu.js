// A small menu below its button: arrows, Home, End and letters move, Escape leaves.

import {el} from './dom.js';

let closeOpen = () => {};

// `items`: {label, detail?, mark?, isChosen?, isGrave?, action}, or null for a line between.
export function openMenu(button, items, label) {
  const wasOpen = button.getAttribute('aria-expanded') === 'true';
  closeOpen();
  if (wasOpen) return;
  const isChoice = items.some(item => item && item.isChosen !== undefined);
  const menu = el('div', {class: 'menu', role: 'menu', 'aria-label': label});
  for (const item of items) {
    if (item === null) { menu.append(el('hr', {})); continue; }
    menu.append(el('button', {
      type: 'button', role: isChoice ? 'menuitemradio' : 'menuitem', tabIndex: -1,
      class: item.isGrave ? 'grave-text' : '',
      'aria-checked': isChoice ? String(Boolean(item.isChosen)) : null,
      onclick: () => { close(); item.action(); },
    }, item.mark ? el('i', {class: `dot ${item.mark}`}) : null,
    el('span', {class: 'label'}, item.label, item.detail ? el('small', {}, item.detail) : null)));
  }
  const buttons = [...menu.querySelectorAll('button')];
  const close = (isBack = true) => {
    menu.remove();
    button.setAttribute('aria-expanded', 'false');
    document.removeEventListener('pointerdown', outside, true);
    window.removeEventListener('resize', close);
    closeOpen = () => {};
    if (isBack) button.focus();
  };
  const outside = event => {
    if (!menu.contains(event.target) && !button.contains(event.target)) close(false);
  };
  menu.addEventListener('keydown', event => {
    const at = buttons.indexOf(document.activeElement), {key} = event;
    let to = {ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1}[key];
    if (to === undefined && key.length === 1 && /\S/.test(key)) {
      const later = [...buttons.slice(at + 1), ...buttons.slice(0, at + 1)];
      const begins = b => b.textContent.trim().toLowerCase().startsWith(key.toLowerCase());
      to = buttons.indexOf(later.find(begins));
      if (to < 0) return;
    }
    if (key === 'Escape' || key === 'Tab') close(key === 'Escape');
    if (to !== undefined) buttons[(to + buttons.length) % buttons.length].focus();
    if (to !== undefined || key === 'Escape') { event.preventDefault(); event.stopPropagation(); }
  });
  document.body.append(menu);
  const box = button.getBoundingClientRect(), width = menu.offsetWidth;
  menu.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
  const isBelow = box.bottom + menu.offsetHeight + 12 < innerHeight || box.top < innerHeight / 2;
  if (isBelow) menu.style.top = `${box.bottom + 6}px`;
  else menu.style.bottom = `${innerHeight - box.top + 6}px`;
  button.setAttribute('aria-expanded', 'true');
  document.addEventListener('pointerdown', outside, true);
  window.addEventListener('resize', close);
  closeOpen = close;
  (buttons.find(b => b.getAttribute('aria-checked') === 'true') || buttons[0])?.focus();
}
