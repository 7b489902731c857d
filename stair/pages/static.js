'use strict';
// The exact search of stair/index in a browser, over the files of stair/export/web.py.

// the WordPiece tokenizer of BERT; `about` states its normalisation
const SPECIAL = /\[(?:UNK|CLS|SEP|PAD|MASK)\]/g;
const CHINESE = new RegExp('[\\u3400-\\u4dbf\\u4e00-\\u9fff\\uf900-\\ufaff\\u{20000}-\\u{2a6df}\\u{2a700}-\\u{2b73f}' +
  '\\u{2b740}-\\u{2b81f}\\u{2b820}-\\u{2ceaf}\\u{2f800}-\\u{2fa1f}]', 'gu');
function tokenize(text, ids, about) {
  text = text.replace(SPECIAL, ' ').replace(/[\t\n\r]/g, ' ').replace(/[\0\ufffd\p{Cc}\p{Cf}\p{Co}\p{Cs}]/gu, '');
  if (about.chinese) text = text.replace(CHINESE, ' $& ');
  if (about.strip) text = text.normalize('NFD').replace(/\p{Mn}/gu, '');
  if (about.lowercase) text = [...text].map(one => one.toLowerCase()).join('');  // one by one: a last sigma is no other
  const found = [];
  for (const word of text.match(/[$+<=>^`|~\p{P}]|[^$+<=>^`|~\p{P}\p{White_Space}]+/gu) || []) {
    const letters = [...word], tokens = [];
    for (let from = 0, to; from < letters.length && letters.length <= 100; from = to) {
      for (to = letters.length; to > from; to--) {
        const id = ids.get((from ? '##' : '') + letters.slice(from, to).join(''));
        if (id !== undefined) { tokens.push(id); break; }
      }
      if (to === from) { tokens.length = 0; break; }  // the word is [UNK]
    }
    found.push(...tokens);
  }
  return found;
}

// `dog:2 beach -people` to weights; null for a text that weighs no word
function weighted(text) {
  const words = {}, parts = text.split(/\s+/).filter(Boolean);
  if (!parts.some(part => /^-.|.:-?[\d.]+$/.test(part))) return null;
  for (const part of parts) {
    const [, minus, word, number = '1'] = /^(-(?=.))?(.+?)(?::(-?(?:\d+\.?\d*|\.\d+)))?$/.exec(part);
    words[word] = (words[word] || 0) + (minus ? -1 : 1) * number;
  }
  return words;
}

class StaticIndex {
  // `read(file, from, to)` resolves to an ArrayBuffer of these bytes
  constructor(about, tokens, read) {
    Object.assign(this, {about, tokens, read, documents: new Map()});
    this.ids = new Map(tokens.map((token, v) => [token, v]));
    this.never = new Set(about.never);
  }
  tokenIds(text) { return tokenize(text, this.ids, this.about).filter(v => !this.never.has(v)); }

  // words of a text by weight: the greatest weight that a token gives a term; without a model, rare tokens weigh more
  async expand(text) {
    const ids = [...new Set(this.tokenIds(text).slice(0, this.about.max_tokens - 2))], weights = new Map();
    const size = 8 * this.about.expansion;
    await Promise.all(ids.map(async v => {
      if (!size) return weights.set(v, Math.log(1 + this.about.documents / ((await this.term(v)).count + 1)));
      const data = await this.read('lookup.bin', v * size, v * size + size);
      const terms = new Uint32Array(data, 0, size / 8), values = new Float32Array(data, size / 2);
      terms.forEach((term, i) => values[i] && weights.set(term, Math.max(values[i], weights.get(term) || 0)));
    }));
    return Object.fromEntries([...weights].sort((a, b) => b[1] - a[1]).map(([v, weight]) => [this.tokens[v], weight]));
  }

  // as `query_of_words`: a word is a term, or its tokens; float32 weights by term, ascending
  query(words) {
    const weights = new Map();
    for (const [word, weight] of Object.entries(words)) {
      const ids = this.ids.has(word) ? [this.ids.get(word)] : this.tokenIds(word);
      if (!ids.length) throw new Error(`the vocabulary has no token of "${word}"`);
      if (!(Math.abs(weight) <= 1e30)) throw new Error(`weight ${weight} of "${word}" is no number up to 1e30`);
      for (const v of ids) weights.set(v, (weights.get(v) || 0) + weight);
    }
    let query = [...weights].map(([v, weight]) => [v, Math.fround(weight)]).filter(([, weight]) => weight);
    query.sort((a, b) => a[0] - b[0]);
    if (this.about.similarity === 'cosine') {
      const length = Math.fround(Math.sqrt(query.reduce((sum, [, weight]) => sum + weight * weight, 0)));
      query = query.map(([v, weight]) => [v, Math.fround(weight / length)]);
    }
    return new Map(query);
  }

  async term(v) {
    const {first, layers} = this.about, size = 16 + 4 * layers;
    const view = new DataView(await this.read('terms.bin', v * size, v * size + size));
    const count = view.getUint32(8, true), sizes = [];
    for (let end = 0; end < count;) {
      const next = sizes.length === layers - 1 ? count : Math.min(count, first * 2 ** sizes.length);
      sizes.push(next - end);
      end = next;
    }
    const ends = sizes.map((_, i) => view.getUint32(16 + 4 * i, true));
    // `rest`: no weight that is not read yet is above it; `step`: how far a bound can lie above a weight
    return {start: view.getFloat64(0, true), count, rest: view.getFloat32(12, true), sizes, ends, read: [], step: 0};
  }

  // reads layers of a term up to one
  async grow(term, until) {
    const from = term.read.length, begin = from ? term.ends[from - 1] : 0;
    const data = await this.read('postings.bin', term.start + begin, term.start + term.ends[until - 1]);
    for (let layer = from, at = 0; layer < until; layer++) {
      const count = term.sizes[layer], [lowest, step] = new Float32Array(data.slice(at, at + 8));
      const content = data.slice(at + 8, term.ends[layer] - begin);
      const bytes = layer ? await inflated(content) : new Uint8Array(content);
      const documents = new Uint32Array(count), bounds = new Float32Array(count);
      for (let i = 0, document = 0, place = count; i < count; i++) {
        let byte, shift = 0, gap = 0;
        do { byte = bytes[place++]; gap += (byte & 127) << shift; shift += 7; } while (byte & 128);
        documents[i] = document += gap;
        bounds[i] = lowest + bytes[i] * step;
      }
      term.read.push({documents, bounds});
      term.step = Math.max(term.step, step);
      term.rest = layer + 1 < term.sizes.length ? lowest : 0;
      at = term.ends[layer] - begin;
    }
  }

  // terms, weights, id, metadata and source of a document, and where its thumbnail is
  async document(n) {
    if (!this.documents.has(n)) {
      const [from, picture, to, end] = new Float64Array(await this.read('places.bin', 16 * n, 16 * n + 32));
      const data = await this.read('documents.bin', from, to), count = new Uint32Array(data, 0, 1)[0];
      const about = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4 + 8 * count)));
      const terms = new Uint32Array(data, 4, count), weights = new Float32Array(data, 4 + 4 * count, count);
      this.documents.set(n, {n, terms, weights, ...about, picture: end > picture && [picture, end]});
    }
    return this.documents.get(n);
  }

  // The k documents of the highest scores above 0, exactly; equal ones in the order of addition.
  //
  // Layers are read, heaviest first, until no document that is in none of them, and few of the others, can be a hit:
  // `upper` is a bound of a document's score, with `rest` for each term whose layers so far do not have it. Before much is
  // read, the most promising documents are scored exactly, which excludes others. Words of negative weight are read whole.
  async search(words, k) {
    const query = this.query(words), terms = [], scored = new Map();
    await Promise.all([...query].map(async ([v, weight]) => {
      const term = await this.term(v);
      if (term.count) terms.push({weight, ...term});
    }));
    const positive = terms.filter(term => term.weight > 0), size = this.about.documents;
    if (!positive.length) return [];
    const seen = new Float32Array(size), upper = new Float32Array(size), listed = new Uint8Array(size), met = [];
    const total = of => terms.reduce((sum, term) => sum + of(term), 0);
    // float32 sums err by less than this
    const slack = 2e-7 * (terms.length + 8) * total(term => Math.abs(term.weight) * term.rest);
    const rest = term => Math.max(0, term.weight * term.rest);
    const cost = term => term.ends[term.read.length] - (term.ends[term.read.length - 1] || 0);
    const read = async (term, until) => {
      const from = term.read.length;
      await this.grow(term, until);
      for (const {documents, bounds} of term.read.slice(from)) {
        const less = term.weight < 0 ? term.step : 0;  // of a negative weight, the least that it takes away
        for (let i = 0; i < documents.length; i++) {
          const n = documents[i];
          seen[n] += term.weight * Math.max(0, bounds[i] - less);
          if (term.weight > 0 && !listed[n]) { listed[n] = 1; met.push(n); }
        }
      }
    };
    const best = () => [...scored.values()].sort((a, b) => b.score - a.score || a.n - b.n).slice(0, k);
    await Promise.all(terms.filter(term => term.weight < 0).map(term => read(term, term.sizes.length)));
    const worth = term => rest(term) / cost(term);
    const chosen = () => {
      const left = positive.filter(rest), most = Math.max(...left.map(worth));
      return left.filter(term => worth(term) >= GREED * most);
    };
    for (;;) {
      const grown = chosen();
      await Promise.all(grown.map(term => read(term, term.read.length + 1)));
      const unread = total(rest), next = chosen().reduce((sum, term) => sum + cost(term), 0);
      const blur = total(term => Math.abs(term.weight) * term.step);
      let threshold = Math.max(best()[k - 1]?.score || 0, highest(met, seen, k) - blur - slack);
      for (const n of met) upper[n] = seen[n] + unread;
      for (const term of positive.filter(rest)) {
        for (const {documents} of term.read) for (let i = 0; i < documents.length; i++) upper[documents[i]] -= rest(term);
      }
      let open = met.filter(n => upper[n] + slack >= threshold && !scored.has(n)).sort((a, b) => upper[b] - upper[a]);
      while (open.length && (!unread || (unread + slack < threshold && open.length <= MORE) || next > DEAR)) {
        const some = await Promise.all(open.slice(0, MORE).map(n => this.document(n)));
        for (const document of some) scored.set(document.n, this.hit(document, query));
        threshold = Math.max(threshold, best()[k - 1]?.score || 0);
        open = open.slice(MORE).filter(n => upper[n] + slack >= threshold);
        if (unread && open.length > MORE) break;
      }
      if (!open.length && (!unread || unread + slack < threshold)) return best().filter(hit => hit.score > 0);
    }
  }
  hit(document, query) {
    let score = 0;
    const words = [];
    document.terms.forEach((v, i) => {
      if (!query.has(v)) return;
      const share = query.get(v) * document.weights[i];
      score += share;
      words.push([this.tokens[v], share]);
    });
    return {...document, score, words: words.sort((a, b) => b[1] - a[1])};
  }
}
// terms are read on together whose bound for a byte is at least so much of the greatest; documents that are scored at a
// time; bytes before which it is worth scoring some
const GREED = 0.3, MORE = 12, DEAR = 40e3;
const inflated = async data => {
  const stream = new DecompressionStream('deflate'), writer = stream.writable.getWriter();
  const done = [writer.write(new Uint8Array(data)), writer.close(), new Response(stream.readable).arrayBuffer()];
  return new Uint8Array((await Promise.all(done))[2]);
};

// the k-th highest of the numbers at some places, or 0
function highest(places, numbers, k) {
  const best = new Float64Array(k);
  for (const place of places) {
    const number = numbers[place];
    if (number <= best[k - 1]) continue;
    let i = k - 1;
    for (; i > 0 && best[i - 1] < number; i--) best[i] = best[i - 1];
    best[i] = number;
  }
  return best[k - 1];
}

async function fetched(file, from, to) {
  if (to === from) return new ArrayBuffer(0);
  const answer = await fetch(file, {headers: {Range: `bytes=${from}-${to - 1}`}});
  if (answer.status === 200) {
    answer.body.cancel();
    throw new Error('This host ignores Range requests and would send whole files; use one that answers them, such as ' +
      'GitHub Pages, S3 or nginx.');
  }
  if (!answer.ok) throw new Error(`${file}: ${answer.status} ${answer.statusText}`);
  const data = await answer.arrayBuffer();
  if (data.byteLength !== to - from) throw new Error(`${file}: ${data.byteLength} bytes instead of ${to - from}`);
  return data;
}
async function opened() {
  if (location.protocol === 'file:') throw new Error('Serve this folder over http: a browser reads no local files.');
  const [about, tokens] = await Promise.all(['about.json', 'vocab.txt'].map(async file => {
    const answer = await fetch(file);
    if (!answer.ok) throw new Error(`${file}: ${answer.status} ${answer.statusText}`);
    return answer.text();
  }));
  await fetched('places.bin', 0, 16);
  return new StaticIndex(JSON.parse(about), tokens.replace(/\n$/, '').split('\n'), fetched);
}
const index = typeof location === 'undefined' ? null : opened(), thumbnails = new Map();
const backend = {
  about: async () => (await index).about,
  text: async text => ({words: weighted(text) || await (await index).expand(text)}),
  search: async words => ({hits: await (await index).search(words, 10)}),
  words: async hit => {
    const terms = [...hit.terms].map((v, i) => [v, hit.weights[i]]).sort((a, b) => b[1] - a[1]), {tokens} = await index;
    return Object.fromEntries(terms.map(([v, weight]) => [tokens[v], weight]));
  },
  picture: async hit => {
    if (!thumbnails.has(hit.n)) {
      const bytes = new Uint8Array(await fetched('thumbnails.bin', ...hit.picture));
      thumbnails.set(hit.n, 'data:image/jpeg;base64,' + btoa(String.fromCharCode(...bytes)));
    }
    return thumbnails.get(hit.n);
  },
};
