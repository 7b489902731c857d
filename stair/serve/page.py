"""The search page: one document without anything to fetch from elsewhere.

Words, captions and ids come from data; the script puts them in as text, never as markup.
"""

import base64
import hashlib

_SCRIPT = r"""
'use strict';
const $ = id => document.getElementById(id);
let words = {}, hits = [], pictures = true, turn = 0;
const UP = 1.5, STEP = 0.1, shown = 40;  // all words of a query count, the heaviest are shown

// controls, and above all those of direction, spelled out; as stair/plain.py
const plain = text => String(text).replace(
  /[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g,
  found => '\\u' + found.charCodeAt(0).toString(16).padStart(4, '0'));
function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  if (properties.textContent) node.textContent = plain(properties.textContent);
  node.append(...children.map(child => child instanceof Node ? child : plain(child)));
  return node;
}
async function ask(path, options) {
  const answer = await fetch(path, options);
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.detail || answer.statusText);
  return content;
}
const post = (path, body) => ask(path, {method: 'POST', body: JSON.stringify(body),
  headers: {'Content-Type': 'application/json'}});
function say(text, bad = false) { $('status').textContent = text; $('status').className = bad ? 'bad' : ''; }
async function guarded(work) {
  document.body.classList.add('busy');
  try { await work(); } catch (error) { say(error.message, true); }
  document.body.classList.remove('busy');
}

function steer(word, how) {
  const now = words[word] || 0;
  if (how === 'off') delete words[word];
  else words[word] = how === 'up' ? (now > 0 ? now * UP : now + 0.5) : (now > STEP ? now / UP : now - 0.5);
  search();
}
function chip(word, weight, most) {
  const bar = make('i', {});
  bar.style.width = Math.round(100 * Math.min(1, Math.abs(weight) / most)) + '%';
  const button = (text, label, how) => {
    const one = make('button', {type: 'button', textContent: text, title: label + ' ' + word});
    one.setAttribute('aria-label', label + ' ' + word);
    one.dataset.key = how + ' ' + word;
    one.onclick = () => steer(word, how);
    return one;
  };
  return make('li', {className: 'chip' + (weight < 0 ? ' against' : '')},
    button('−', 'weigh less', 'down'),
    make('span', {className: 'word'}, word, make('small', {textContent: ' ' + weight.toFixed(2)}), bar),
    button('+', 'weigh more', 'up'), button('×', 'leave out', 'off'));
}
function lighter(count) {
  return count > shown ? [make('li', {className: 'lighter', textContent: 'and ' + (count - shown) + ' lighter'})] : [];
}
function showQuery() {
  const most = Math.max(0.01, ...Object.values(words).map(Math.abs));
  const heavy = Object.entries(words).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, shown);
  $('query').replaceChildren(...heavy.sort((a, b) => b[1] - a[1]).map(([word, weight]) => chip(word, weight, most)),
    ...lighter(Object.keys(words).length));
}
const address = (path, id, more = {}) => path + '?' + new URLSearchParams({id, ...more});
function caption(hit) {
  const known = hit.source;
  return plain(known.text || (known.captions || [])[0] || hit.metadata.caption || hit.id);
}
function card(hit) {
  const item = make('li', {className: 'hit'});
  if (pictures && hit.source.file) {
    const still = address('/picture', hit.id);
    const shares = Object.fromEntries(hit.words.filter(pair => pair[1] > 0).slice(0, 24));
    const image = make('img', {src: still, alt: caption(hit), loading: 'lazy'});
    const open = make('button', {type: 'button', className: 'open', title: 'words of this picture'}, image);
    const hot = () => { image.src = address('/heat', hit.id, {words: JSON.stringify(shares)}); };
    const cold = () => { image.src = still; };
    open.onmouseenter = open.onfocus = hot;
    open.onmouseleave = open.onblur = cold;
    open.onclick = () => showWords(hit);
    item.append(open);
  }
  item.append(make('p', {className: 'caption', textContent: caption(hit)}),
    make('p', {className: 'score', textContent: 'score ' + hit.score.toFixed(3)}));
  const shared = hit.words.slice(0, 6).map(([word, share]) => {
    const one = make('button', {type: 'button', textContent: word + ' ' + share.toFixed(2), title: 'more of ' + word});
    one.onclick = event => steer(word, event.shiftKey ? 'off' : event.altKey ? 'down' : 'up');
    return make('li', {}, one);
  });
  item.append(make('ul', {className: 'shared'}, ...shared));
  return item;
}
async function search() {
  const mine = ++turn, focused = document.activeElement && document.activeElement.dataset.key;
  showQuery();
  if (focused) document.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  await guarded(async () => {
    const found = (await post('/api/search', {words, k: 24, where: $('where').value})).hits;
    if (mine !== turn) return;
    hits = found;
    $('hits').replaceChildren(...hits.map(card));
    say(hits.length ? hits.length + ' hits' : Object.keys(words).length ? 'nothing shares a word with this' : '');
  });
}
async function showWords(hit) {
  await guarded(async () => {
    const found = (await ask(address('/api/words', hit.id))).words;
    const most = Math.max(...Object.values(found));
    $('of').textContent = caption(hit);
    const all = Object.entries(found);
    $('list').replaceChildren(...all.slice(0, shown).map(([word, weight]) => {
      const bar = make('i', {});
      bar.style.width = Math.round(100 * weight / most) + '%';
      const number = make('small', {textContent: ' ' + weight.toFixed(3)});
      return make('li', {}, make('span', {className: 'word'}, word, number, bar));
    }), ...lighter(all.length));
    $('like').onclick = () => { words = found; $('words').close(); search(); };
    $('words').showModal();
  });
}
function upload(file) {
  if (!file) return;
  guarded(async () => {
    say('reading ' + file.name);
    words = (await ask('/api/image', {method: 'POST', body: file})).words;
    $('text').value = '';
    await search();
  });
}
$('form').onsubmit = event => {
  event.preventDefault();
  guarded(async () => {
    words = (await post('/api/text', {text: $('text').value})).words;
    await search();
  });
};
$('file').onchange = event => { upload(event.target.files[0]); event.target.value = ''; };
$('where').onchange = () => search();
$('close').onclick = () => $('words').close();
document.ondragover = event => { event.preventDefault(); document.body.classList.add('over'); };
document.ondragleave = () => document.body.classList.remove('over');
document.ondrop = event => {
  event.preventDefault();
  document.body.classList.remove('over');
  upload(event.dataTransfer.files[0]);
};
document.onkeydown = event => {
  const typing = /INPUT|TEXTAREA/.test(event.target.tagName);
  if (event.key === '/' && !typing) { event.preventDefault(); $('text').select(); }
};
ask('/api/about').then(about => {
  pictures = about.pictures;
  say(about.documents + ' documents');
  $('where').placeholder = about.keys.length ? 'filter, such as ' + about.keys[0] + '=…' : 'filter';
}).catch(error => say(error.message, true));
"""

_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #fff; --ink: #1d2126; --soft: #5d656e; --line: #d9dad4;
  --own: #1f7a6d; --against: #b3403a; --track: #e9e9e4; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e8eaec; --soft: #9ba4ad;
  --line: #343b42; --own: #3aa394; --against: #e0766f; --track: #272c31; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.45 system-ui, sans-serif;
  overflow-wrap: anywhere; }
body.over { outline: 4px dashed var(--own); outline-offset: -8px; }
body.busy { cursor: progress; }
main { max-width: 1160px; margin: 0 auto; padding: 18px 14px 60px; }
h1 { font-size: 22px; margin: 0 0 12px; }
form { display: flex; flex-wrap: wrap; gap: 8px; }
input[type=text] { flex: 1 1 200px; min-width: 0; font: inherit; padding: 10px 12px; border-radius: 8px;
  background: var(--card); border: 1px solid var(--line); color: inherit; }
#where { flex: 1 1 130px; }
button, label.button { font: inherit; padding: 9px 14px; border-radius: 8px; border: 1px solid var(--line); color: inherit;
  background: var(--card); cursor: pointer; }
form > button { background: var(--own); border-color: var(--own); color: #fff; }
:focus-visible, label.button:focus-within { outline: 3px solid var(--own); outline-offset: 2px; }
#file { position: absolute; opacity: 0; width: 1px; height: 1px; }
#status { min-height: 1.5em; margin: 10px 0; color: var(--soft); } #status.bad { color: var(--against); font-weight: 600; }
ul { list-style: none; margin: 0; padding: 0; }
#query { display: flex; flex-wrap: wrap; gap: 6px; }
.chip { display: flex; align-items: stretch; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.chip button { border: 0; padding: 4px 11px; min-height: 36px; background: none; }
.word { position: relative; padding: 5px 4px 9px; min-width: 60px; }
.word i { position: absolute; left: 4px; bottom: 4px; height: 4px; border-radius: 2px; background: var(--own); }
.against .word i { background: var(--against); } .against .word { text-decoration: line-through; }
small { color: var(--soft); }
#hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 14px; margin-top: 14px; }
.hit { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px; }
.open { padding: 0; border: 0; width: 100%; background: var(--track); border-radius: 6px; overflow: hidden; }
.open img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; }
.hit p { margin: 7px 0 0; font-size: 14px; line-height: 1.3; } .score { color: var(--soft); }
.shared { display: flex; flex-wrap: wrap; gap: 4px; margin-top: 7px; }
.shared button { font-size: 13px; padding: 4px 8px; min-height: 30px; }
dialog { border: 1px solid var(--line); border-radius: 12px; background: var(--card); color: inherit;
  width: min(430px, 94vw); }
dialog::backdrop { background: #0007; }
#list { columns: 2; margin: 10px 0 16px; } #list .word { display: block; margin-bottom: 4px; break-inside: avoid; }
.lighter { align-self: center; color: var(--soft); font-size: 14px; }
.help { color: var(--soft); font-size: 14px; margin: 8px 0 0; }
@media (max-width: 520px) { #hits { grid-template-columns: repeat(2, 1fr); gap: 10px; } }
"""

_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
#: nothing but this page's own script runs, and nothing is asked of any other host
POLICY = (
    f"default-src 'none'; script-src 'sha256-{_HASH}'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>STAIR search</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>Search by words you can see</h1>
<form id="form">
<input type="text" id="text" aria-label="what to look for" placeholder="what to look for" autofocus autocomplete="off">
<input type="text" id="where" aria-label="filter on metadata" placeholder="filter" autocomplete="off">
<button>Search</button>
<label class="button">Picture <input type="file" id="file" accept="image/*" aria-label="search by a picture"></label>
</form>
<p class="help">Or drop a picture anywhere. <kbd>/</kbd> goes to the search box. Weigh the query's words with + and −,
× leaves one out; a word under a hit weighs more at a click, less with Alt, and goes with Shift.</p>
<p id="status" role="status" aria-live="polite"></p>
<ul id="query" aria-label="words of the query"></ul>
<ul id="hits" aria-label="hits"></ul>
</main>
<dialog id="words" aria-labelledby="of">
<h2 id="of"></h2><ul id="list"></ul>
<button type="button" id="like">Search like this</button> <button type="button" id="close">Close</button>
</dialog>
<script>{_SCRIPT}</script>
</body>
</html>
"""
