// Pictures in messages: chosen, pasted or dropped, and shown as images only, never as documents.

import {request, url} from './api.js';
import {el} from './dom.js';

const MAX_BYTES = 20e6;
export const PICTURES = ['image/jpeg', 'image/png', 'image/webp', 'image/gif', 'image/bmp',
  'image/avif'];
export const isPicture = file => file.type.startsWith('image/');

// A picture to be sent, as a part of a message; `src` shows it on this page. Throws why not.
export async function taken(file) {
  if (!PICTURES.includes(file.type)) {
    throw new Error(`${file.name} is no JPEG, PNG, WebP, GIF, BMP or AVIF.`);
  }
  if (file.size > MAX_BYTES) throw new Error(`${file.name} is larger than 20 MB.`);
  const data = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
  return {type: 'image_url', image_url: {url: data}, src: URL.createObjectURL(file)};
}

const isMedia = part => part.type === 'media' || part.type === 'image_url';

// What of a message is no text; in another message it can be sent again.
export function mediaOf(message) {
  return Array.isArray(message.content) ? message.content.filter(isMedia) : [];
}

// The content of a message: pictures, then a text.
export function contentOf(pictures, text) {
  if (!pictures.length) return text;
  return [...pictures, ...(text ? [{type: 'text', text}] : [])];
}

// The same without what only this page knows.
export function sendable(content) {
  return Array.isArray(content) ? content.map(({src, ...part}) => part) : content;
}

const known = new Map();  // digest → where it is shown from

async function load(session, digest) {
  const reply = await request('GET', url`v1/sessions/${session}/media/${digest}`);
  return URL.createObjectURL(await reply.blob());
}

// The pictures of a message, as elements.
export function shown(message) {
  return mediaOf(message).map(part => {
    if (part.kind === 'audio') return el('span', {class: 'hint'}, '(a sound)');
    const image = el('img', {alt: 'Picture', decoding: 'async'});
    if (String(part.src).startsWith('blob:')) image.src = part.src;  // what this page made
    else {
      const {session} = message;
      if (!known.has(part.digest)) known.set(part.digest, load(session, part.digest));
      known.get(part.digest).then(src => { image.src = src; }, () => {
        known.delete(part.digest);
        image.alt = 'Picture that cannot be shown';
      });
    }
    return image;
  });
}

// Another conversation is shown.
export function forget() {
  for (const place of known.values()) place.then(src => URL.revokeObjectURL(src), () => {});
  known.clear();
}
