// The search page. `backend`, of server.js or static.js, answers it.
const $ = id => document.getElementById(id);
let words = {}, own = new Set(), typed = false, having = [], hits = [], pictures = true, turn = 0;
const UP = 1.5, STEP = 0.1, SHOWN = 40;  // terms of a document in the dialog
// all terms of a query count, the heaviest are shown: fewer on a phone, where each takes a line above the hits
const shown = matchMedia('(max-width: 600px)').matches ? 6 : 20;

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
function say(text, bad = false) { $('status').textContent = text; $('status').className = bad ? 'bad' : ''; }
async function guarded(work) {
  document.body.classList.add('busy');
  try { await work(); } catch (error) { say(error.message, true); }
  document.body.classList.remove('busy');
}

// takes the terms of a query; those of a text come with the tokens of its own words
function take(query) {
  words = query.words;
  having = [];
  own = new Set(query.own || []);
  typed = Boolean(query.own);
  $('missing').textContent = plain(query.missing?.length ? 'No document has: ' + query.missing.join(', ') : '');
}
const kind = word => own.size && !own.has(word) ? ' expansion' : '';
function steer(word, how) {
  typed = false;
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
    button('−', 'lower the weight of', 'down'),
    make('span', {className: 'word' + kind(word)}, word, make('small', {textContent: ' ' + weight.toFixed(2)}), bar),
    button('+', 'raise the weight of', 'up'), button('×', 'remove', 'off'));
}
function lighter(count, shown) {
  return count > shown ? [make('li', {className: 'lighter', textContent: 'and ' + (count - shown) + ' more'})] : [];
}
function showQuery() {
  const most = Math.max(0.01, ...Object.values(words).map(Math.abs));
  const heavy = Object.entries(words).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, shown);
  $('query').replaceChildren(...heavy.sort((a, b) => b[1] - a[1]).map(([word, weight]) => chip(word, weight, most)),
    ...lighter(Object.keys(words).length, shown));
}
// chips that keep the hits with a term, and those in force, which a click removes
function showRefine(found) {
  const chosen = having.map(token => [token, '×', 'stop asking for', having.filter(other => other !== token)]);
  const offered = (found.refine || []).map(part => [part.token, part.hits, 'keep hits with', [...having, part.token]]);
  $('refine').replaceChildren(...[...chosen, ...offered].map(([token, text, label, next]) => {
    const one = make('button', {type: 'button', textContent: token + ' ' + text, title: label + ' ' + token,
      className: having.includes(token) ? 'chosen' : ''});
    one.setAttribute('aria-label', label + ' ' + token);
    one.onclick = () => { having = next; search(); };
    return make('li', {}, one);
  }));
}
function caption(hit) {
  const known = hit.source;
  return plain(known.text || (known.captions || [])[0] || hit.metadata.caption || hit.id);
}
function card(hit) {
  const item = make('li', {className: 'hit'});
  if ('picture' in hit ? hit.picture : pictures && hit.source.file) {
    const shares = Object.fromEntries(hit.words.filter(pair => pair[1] > 0).slice(0, 24));
    const image = make('img', {alt: caption(hit)});
    const open = make('button', {type: 'button', className: 'open', title: 'terms of this image'}, image);
    const show = async way => {
      try { image.src = await backend[way](hit, shares); } catch (error) { say(error.message, true); }
    };
    show('picture');
    if (backend.heat) open.onmouseenter = open.onfocus = () => show('heat');
    if (backend.heat) open.onmouseleave = open.onblur = () => show('picture');
    open.onclick = () => showWords(hit);
    item.append(open);
  }
  item.append(make('p', {className: 'caption', textContent: caption(hit)}),
    make('p', {className: 'score', textContent: 'score ' + hit.score.toFixed(3)}));
  const shared = hit.words.slice(0, 6).map(([word, share]) => {
    const one = make('button', {type: 'button', className: kind(word), textContent: word + ' ' + share.toFixed(2),
      title: 'raise the weight of ' + word});
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
    const max_error = Number($('error')?.value) || null, weighting = $('idf')?.checked ? 'idf' : 'plain';
    const kept = typed && weighting === 'plain' ? max_error : null;
    const found = await backend.search(words, {where: $('where')?.value, having, weighting, max_error: kept});
    if (mine !== turn) return;
    hits = found.hits;
    $('hits').replaceChildren(...hits.map(card));
    showRefine(found);
    const none = found.threshold ? 'no match: no document scores ' + found.threshold.toFixed(3) + ' or more'
      : Object.keys(words).length ? 'no document shares a term with the query' : '';
    say((hits.length ? hits.length + ' hits' : none) + (max_error && !kept ? ' (max error is for texts as typed)' : ''));
  });
}
async function showWords(hit) {
  await guarded(async () => {
    const found = await backend.words(hit);
    const most = Math.max(...Object.values(found));
    $('of').textContent = caption(hit);
    const all = Object.entries(found);
    $('list').replaceChildren(...all.slice(0, SHOWN).map(([word, weight]) => {
      const bar = make('i', {});
      bar.style.width = Math.round(100 * weight / most) + '%';
      const number = make('small', {textContent: ' ' + weight.toFixed(3)});
      return make('li', {}, make('span', {className: 'word'}, word, number, bar));
    }), ...lighter(all.length, SHOWN));
    $('like').onclick = () => { take({words: found}); $('words').close(); search(); };
    $('words').showModal();
  });
}
function upload(file) {
  if (!file) return;
  guarded(async () => {
    say('reading ' + file.name);
    take(await backend.image(file));
    $('text').value = '';
    await search();
  });
}
$('form').onsubmit = event => {
  event.preventDefault();
  guarded(async () => {
    take({words: {}});
    try { take(await backend.text($('text').value)); } finally { await search(); }
  });
};
if (backend.image) {
  $('file').onchange = event => { upload(event.target.files[0]); event.target.value = ''; };
  $('where').onchange = $('error').onchange = $('idf').onchange = () => search();
  document.ondragover = event => { event.preventDefault(); document.body.classList.add('over'); };
  document.ondragleave = () => document.body.classList.remove('over');
  document.ondrop = event => {
    event.preventDefault();
    document.body.classList.remove('over');
    upload(event.dataTransfer.files[0]);
  };
}
$('close').onclick = () => $('words').close();
document.onkeydown = event => {
  const typing = /INPUT|TEXTAREA/.test(event.target.tagName);
  if (event.key === '/' && !typing) { event.preventDefault(); $('text').select(); }
};
backend.about().then(about => {
  pictures = about.pictures;
  say(about.documents + ' documents');
  if (about.calibrated_on) {
    $('setting').hidden = false;
    $('error').value = about.max_error ?? '';
  }
  if (about.keys) $('where').placeholder = about.keys.length ? 'filter, such as ' + about.keys[0] + '=…' : 'filter';
}).catch(error => say(error.message, true));
