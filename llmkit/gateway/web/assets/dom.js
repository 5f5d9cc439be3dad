// Elements, icons, and what is said to people: the polite region and short notes.

const PATHS = {
  menu: 'M4 7h16M4 12h16M4 17h10',
  plus: 'M12 5v14M5 12h14',
  search: 'M11 4a7 7 0 1 1 0 14 7 7 0 0 1 0-14zM20 20l-4-4',
  more: 'M5 12h.01M12 12h.01M19 12h.01',
  send: 'M12 19V5M6 11l6-6 6 6',
  stop: 'M7.5 7.5h9v9h-9z',
  copy: 'M9 9h10v11H9zM5 15V4h10',
  check: 'M5 13l4 4L19 7',
  edit: 'M4 20l1-4L16 5l3 3L8 19zM14 7l3 3',
  again: 'M20 11a8 8 0 1 0-2.3 6.3M20 5v6h-6',
  left: 'M14 6l-6 6 6 6',
  right: 'M10 6l6 6-6 6',
  down: 'M6 10l6 6 6-6',
  clip: 'M20 11l-8.5 8.5a5 5 0 0 1-7-7L13 4a3.4 3.4 0 0 1 4.8 4.8L9.5 17a1.7 1.7 0 0 1-2.4-2.4'
    + 'L14 7.7',
  tune: 'M4 7h9M17 7h3M4 17h3M11 17h9M15 5v4M9 15v4',
  sun: 'M12 8a4 4 0 1 1 0 8 4 4 0 0 1 0-8zM12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4'
    + 'M17.3 17.3l1.4 1.4M5.3 18.7l1.4-1.4M17.3 6.7l1.4-1.4',
  moon: 'M20 14A8 8 0 1 1 10 4a6.5 6.5 0 0 0 10 10z',
  close: 'M6 6l12 12M18 6L6 18',
  tool: 'M14 6a4 4 0 0 0-5 5L4 16l4 4 5-5a4 4 0 0 0 5-5l-3 3-4-4z',
  think: 'M12 3a6 6 0 0 1 3.5 10.9V16h-7v-2.1A6 6 0 0 1 12 3zM9.5 19.5h5',
  file: 'M6 3h8l4 4v14H6zM14 3v4h4',
};

// An icon beside words, or in a button that has a label.
export function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  svg.setAttribute('viewBox', '0 0 24 24');
  svg.setAttribute('aria-hidden', 'true');
  svg.setAttribute('class', 'icon');
  const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
  path.setAttribute('d', PATHS[name]);
  svg.append(path);
  return svg;
}

// An element: properties (class, dataset, on…, aria-…), then its children; strings stay text.
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'class') element.className = value;
    else if (name in element && !name.includes('-')) element[name] = value;
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}

export function iconButton(name, label, onclick, more = {}) {
  return el('button', {type: 'button', class: 'ghost', title: label, 'aria-label': label, onclick,
    ...more}, icon(name));
}

export const $ = id => document.getElementById(id);

// The one polite region of the page.
export function say(text) {
  $('said').textContent = '';
  requestAnimationFrame(() => { $('said').textContent = text; });
}

let hiding = 0;

// A short note, for a while; an error stays longer.
export function note(text, isError = false) {
  const box = $('note');
  box.textContent = text;
  box.hidden = !text;
  box.classList.toggle('error', isError);
  clearTimeout(hiding);
  if (text) {
    say(text);
    hiding = setTimeout(() => { box.hidden = true; }, isError ? 9000 : 3000);
  }
}

export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch (error) {  // a page without TLS has no clipboard
    const area = el('textarea', {class: 'offscreen', value: text});
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
    button.focus();
  }
  const before = button.querySelector('.icon');
  const done = icon('check');
  before.replaceWith(done);
  say('Copied');
  setTimeout(() => done.replaceWith(before), 1500);
}

export function save(name, blob) {
  const url = URL.createObjectURL(blob);
  const link = el('a', {href: url, download: name});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// Ask before something is lost, or for a text. Gives null if the answer is no.
export function ask({title, text = '', value = null, action, isGrave = false}) {
  return new Promise(resolve => {
    const field = value === null ? null
      : el('input', {type: 'text', value, 'aria-label': title, maxLength: 200});
    const form = el('form', {method: 'dialog'},
      el('h2', {id: 'ask-title'}, title), text ? el('p', {}, text) : null, field,
      el('div', {class: 'row end'},
        el('button', {type: 'button', class: 'plain', onclick: () => dialog.close('')}, 'Cancel'),
        el('button', {class: isGrave ? 'grave' : 'strong', value: 'yes'}, action)));
    const dialog = el('dialog', {class: 'ask', 'aria-labelledby': 'ask-title'}, form);
    form.addEventListener('submit', event => {  // the policy of the page lets no form go anywhere
      event.preventDefault();
      dialog.close('yes');
    });
    dialog.addEventListener('close', () => {
      dialog.remove();
      resolve(dialog.returnValue !== 'yes' ? null : field ? field.value.trim() : true);
    });
    document.body.append(dialog);
    dialog.showModal();
    if (field) field.select();
  });
}
