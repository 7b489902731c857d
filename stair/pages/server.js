'use strict';
// `stair serve` answers the search page.
async function ask(path, options) {
  const answer = await fetch(path, options);
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.detail || answer.statusText);
  return content;
}
const post = (path, body) => ask(path, {method: 'POST', body: JSON.stringify(body),
  headers: {'Content-Type': 'application/json'}});
const address = (path, id, more = {}) => path + '?' + new URLSearchParams({id, ...more});
const backend = {
  about: () => ask('/api/about'),
  text: text => post('/api/text', {text}),
  image: file => ask('/api/image', {method: 'POST', body: file}),
  search: (words, options) => post('/api/search', {words, k: 24, refine: 8, ...options}),
  words: async hit => (await ask(address('/api/words', hit.id))).words,
  picture: async hit => address('/picture', hit.id),
  heat: async (hit, words) => address('/heat', hit.id, {words: JSON.stringify(words)}),
};
