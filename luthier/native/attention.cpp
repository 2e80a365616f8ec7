// Causal attention over the documents of a packed batch, bfloat16, forward and backward, in place.
//
// Scores are held transposed, [keys, queries]: the softmax of a query then runs down the vectors, and its
// results are the factors of the next product without a transposition. The query heads of a group stand side by
// side as columns. Of the forward, only the log-sum-exp is kept. Work is cut into squares of SQUARE queries by
// SQUARE keys; in the backward, squares run diagonal by diagonal: no two of one diagonal share queries or keys,
// so that sums need no locks and their order does not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "product.h"

namespace {

constexpr int BLOCK = 64, SQUARE = 256, BLOCKS = SQUARE / BLOCK, GROUP = 4;
constexpr float LOWEST = -1e30f, LOG2E = 1.44269504f;

struct Heads {  // [rows, tokens, heads, size], any strides but the last
  bf16* data;
  int64_t row, token, head;
};

struct Shape {
  int64_t groups, repeat, size, value_size, window;  // window: 0 = none
  float scale;
  int keys_padded, values_padded, parts, most;  // parts of a group, at most `most` heads each

  Shape(const int64_t* sizes, float scale)
      : groups(sizes[0]), repeat(sizes[1]), size(sizes[2]), value_size(sizes[3]), window(sizes[4]), scale(scale) {
    keys_padded = int(size + 31) / 32 * 32;
    values_padded = int(value_size + 31) / 32 * 32;
    parts = int(repeat + GROUP - 1) / GROUP;
    most = int(repeat + parts - 1) / parts;
  }
  int heads_of(int part) const { return int(std::min<int64_t>(most, repeat - int64_t(part) * most)); }
  // the first key that a query sees
  int64_t first(int64_t query) const { return window ? std::max<int64_t>(0, query - window + 1) : 0; }
};

struct Document {
  int64_t row, start, length, before;  // blocks before its first one, over the whole batch
};

struct Square {
  int document, group, part;
  int64_t queries, keys;  // in squares
  int64_t cost;
};

struct Memory {  // grows, is aligned, and is kept: fresh memory costs page faults
  void* data = nullptr;
  size_t size = 0;
  template <class T> T* take(size_t count) {
    if (count * sizeof(T) > size) {
      free(data);
      size = (count * sizeof(T) + 4095) / 4096 * 4096;
      data = aligned_alloc(4096, size);
    }
    return (T*)data;
  }
  ~Memory() { free(data); }
};

struct Cutter {  // takes pieces of one piece of memory
  char* at;
  template <class T> T* take(size_t count) {
    T* out = (T*)at;
    at += (count * sizeof(T) + 63) / 64 * 64;
    return out;
  }
};

// tokens [begin, end) of one head -> rows [BLOCK][padded], zeros elsewhere
void copy_rows(const bf16* from, int64_t stride, int64_t count, int64_t size, int padded, bf16* to) {
  for (int64_t i = 0; i < count; i++) {
    memcpy(to + i * padded, from + i * stride, size * sizeof(bf16));
    if (padded > size) memset(to + i * padded + size, 0, (padded - size) * sizeof(bf16));
  }
  if (count < BLOCK) memset(to + count * padded, 0, (BLOCK - count) * padded * sizeof(bf16));
}

// the columns of a block of queries: head after head, BLOCK queries each -> rows [heads * BLOCK][padded]
void copy_columns(const Heads& x, const Document& d, int64_t head, int heads, int64_t begin, int64_t size,
                  int padded, bf16* to) {
  int64_t count = std::min<int64_t>(BLOCK, d.length - begin);
  for (int h = 0; h < heads; h++)
    copy_rows(x.data + d.row * x.row + (d.start + begin) * x.token + (head + h) * x.head, x.token, count, size,
              padded, to + int64_t(h) * BLOCK * padded);
}

// columns [padded][heads * BLOCK] (float32, transposed) -> tokens
template <class Factor>
void write_columns(const float* from, const Heads& x, const Document& d, int64_t head, int heads, int64_t begin,
                   int64_t size, int padded, float* scratch, Factor factor) {
  int64_t count = std::min<int64_t>(BLOCK, d.length - begin);
  int columns = heads * BLOCK;
  transpose(from, padded, columns, scratch);  // [columns][padded]
  for (int h = 0; h < heads; h++)
    for (int64_t i = 0; i < count; i++) {
      bf16* to = x.data + d.row * x.row + (d.start + begin + i) * x.token + (head + h) * x.head;
      float* row = scratch + (int64_t(h) * BLOCK + i) * padded;
      float by = factor(h * BLOCK + i);
      int64_t c = 0;
      for (; c + 16 <= size; c += 16) put(to + c, load<Floats>(row + c) * by);
      for (; c < size; c++) to[c] = narrow(all(row[c] * by))[0];
    }
}

void write_rows(const float* from, const Heads& x, const Document& d, int64_t head, int64_t begin, int64_t size,
                int padded) {
  int64_t count = std::min<int64_t>(BLOCK, d.length - begin);
  for (int64_t i = 0; i < count; i++) {
    bf16* to = x.data + d.row * x.row + (d.start + begin + i) * x.token + head * x.head;
    const float* row = from + i * padded;
    int64_t c = 0;
    for (; c + 16 <= size; c += 16) put(to + c, load<Floats>(row + c));
    for (; c < size; c++) to[c] = narrow(all(row[c]))[0];
  }
}

// which keys a vector of sixteen columns sees; `whole`: all do
struct Seen {
  bool whole;
  int64_t window;
  Ints operator()(Ints query, int key) const {
    Ints seen = query >= key;
    return window ? seen & (query - int32_t(window) < key) : seen;
  }
};
Seen seen(const Shape& s, int64_t query, int64_t key) {
  bool inside = key + BLOCK - 1 <= query && (!s.window || query + BLOCK - 1 - s.window < key);
  return {inside, s.window};
}
INLINE Ints places(int64_t query, int column) {
  Ints out = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return out + int32_t(query + column % BLOCK);
}

// one block of keys enters the running softmax: scores S [BLOCK][columns] -> weights, as pairs of rows
void take_block(const float* S, int columns, float scale, Seen see, int64_t query, int64_t key, float* top,
                float* total, float* out, int rows, bf16* P) {
  for (int c = 0; c < columns; c += 16) {
    Ints place = places(query, c);
    Floats most = all(LOWEST);
    for (int j = 0; j < BLOCK; j++) {
      Floats x = load<Floats>(S + j * columns + c) * scale;
      if (!see.whole) x = see(place, int(key) + j) ? x : all(LOWEST);
      most = larger(most, x);
    }
    Floats old = load<Floats>(top + c);
    most = larger(most, old);
    Floats shrink = exp2(old - most), added = {};
    for (int j = 0; j < BLOCK; j += 2) {
      Floats a = exp2(load<Floats>(S + j * columns + c) * scale - most);
      Floats b = exp2(load<Floats>(S + (j + 1) * columns + c) * scale - most);
      if (!see.whole) {
        a = see(place, int(key) + j) ? a : Floats{};
        b = see(place, int(key) + j + 1) ? b : Floats{};
      }
      added += a + b;
      store(P + j * columns + 2 * c, paired(narrow(a), narrow(b)));
    }
    store(total + c, load<Floats>(total + c) * shrink + added);
    store(top + c, most);
    bool moved = false;
    for (int i = 0; i < 16; i++) moved |= shrink[i] != 1.f;
    if (moved)
      for (int r = 0; r < rows; r++)
        store(out + r * columns + c, load<Floats>(out + r * columns + c) * shrink);
  }
}

void forward_square(const Heads& q, const Heads& k, const Heads& v, const Heads& out, float* lse, int64_t tokens,
                    const Shape& s, const Document& d, const Square& at) {
  thread_local Memory memory;
  const int heads = s.heads_of(at.part), columns = heads * BLOCK, Kp = s.keys_padded, Vp = s.values_padded;
  const int64_t head = at.group * s.repeat + at.part * s.most, begin = at.queries * SQUARE;
  const int blocks = int((std::min<int64_t>(SQUARE, d.length - begin) + BLOCK - 1) / BLOCK);
  const int widest = std::max(Kp, Vp);
  Cutter cut{memory.take<char>(size_t(columns) * (BLOCKS * (Kp * 2 + Vp * 4 + 8) + BLOCK * 8 + widest * 4) +
                               size_t(BLOCK) * widest * 10 + 64 * 64)};
  bf16* queries = cut.take<bf16>(BLOCKS * columns * Kp);    // pairs, transposed
  float* sums = cut.take<float>(BLOCKS * columns * Vp);     // [Vp][columns] each
  float* tops = cut.take<float>(BLOCKS * columns);
  float* totals = cut.take<float>(BLOCKS * columns);
  float* S = cut.take<float>(BLOCK * columns);
  bf16* P = cut.take<bf16>(BLOCK * columns);
  float* scratch = cut.take<float>(columns * widest);
  bf16* keys = cut.take<bf16>(BLOCK * Kp);
  bf16* values = cut.take<bf16>(BLOCK * Vp);                // transposed, [Vp][BLOCK]
  bf16* rows = cut.take<bf16>(BLOCK * widest);
  bf16* pairs = cut.take<bf16>(BLOCK * widest);
  for (int b = 0; b < blocks; b++) {
    copy_columns(q, d, head, heads, begin + b * BLOCK, s.size, Kp, (bf16*)scratch);
    transpose(scratch, columns, Kp / 2, queries + b * columns * Kp);
  }
  memset(sums, 0, sizeof(float) * BLOCKS * columns * Vp);
  std::fill(tops, tops + BLOCKS * columns, LOWEST);
  std::fill(totals, totals + BLOCKS * columns, 0.f);
  int64_t end = std::min<int64_t>(begin + SQUARE, d.length);
  for (int64_t key = s.first(begin) / BLOCK * BLOCK; key < end; key += BLOCK) {
    int64_t count = std::min<int64_t>(BLOCK, d.length - key);
    copy_rows(k.data + d.row * k.row + (d.start + key) * k.token + at.group * k.head, k.token, count, s.size, Kp, keys);
    copy_rows(v.data + d.row * v.row + (d.start + key) * v.token + at.group * v.head, v.token, count, s.value_size, Vp, rows);
    interleave(rows, BLOCK, Vp, pairs);
    transpose(pairs, BLOCK / 2, Vp, values);
    for (int b = 0; b < blocks; b++) {
      int64_t query = begin + b * BLOCK;
      if (key > query || key + BLOCK <= s.first(query)) continue;
      product(BLOCK, columns, Kp, keys, queries + b * columns * Kp, S, false);
      take_block(S, columns, s.scale * LOG2E, seen(s, query, key), query, key, tops + b * columns,
                 totals + b * columns, sums + b * columns * Vp, Vp, P);
      product(Vp, columns, BLOCK, values, P, sums + b * columns * Vp, true);
    }
  }
  for (int b = 0; b < blocks; b++) {
    const float* total = totals + b * columns;
    write_columns(sums + b * columns * Vp, out, d, head, heads, begin + b * BLOCK, s.value_size, Vp, scratch,
                  [&](int64_t c) { return 1.f / total[c]; });
    int64_t count = std::min<int64_t>(BLOCK, d.length - begin - b * BLOCK);
    for (int h = 0; h < heads; h++)
      for (int64_t i = 0; i < count; i++) {
        int64_t c = h * BLOCK + i, all_heads = s.groups * s.repeat;
        lse[(d.row * all_heads + head + h) * tokens + d.start + begin + b * BLOCK + i] =
            (tops[b * columns + c] + std::log2(total[c])) / LOG2E;
      }
  }
}

struct Sums {  // float32 gradients of the documents whose squares share them
  float *queries, *keys, *values;
};

void backward_square(const Heads& q, const Heads& k, const Heads& v, const Heads& dout, const float* lse,
                     const float* delta, int64_t tokens, const Heads& dq, const Heads& dk, const Heads& dv, Sums sums,
                     const Shape& s, const Document& d, const Square& at) {
  thread_local Memory memory;
  const int Kp = s.keys_padded, Vp = s.values_padded, widest = std::max(Kp, Vp), wide = s.most * BLOCK;
  const int64_t first_query = at.queries * SQUARE, first_key = at.keys * SQUARE;
  auto count_blocks = [&](int64_t begin) { return int((std::min<int64_t>(SQUARE, d.length - begin) + BLOCK - 1) / BLOCK); };
  const int query_blocks = count_blocks(first_query), key_blocks = count_blocks(first_key);
  const bool alone = d.length <= SQUARE;
  Cutter cut{memory.take<char>(size_t(SQUARE) * (6 * Kp + 2 * Vp + 4 * Kp + 4 * Vp) +
                               size_t(wide) * (14 * widest + BLOCK * 14) + size_t(wide) * 8 +
                               (alone ? size_t(wide) * Kp * 4 : 0) + 64 * 64)};
  bf16* keys = cut.take<bf16>(SQUARE * Kp);        // rows
  bf16* values = cut.take<bf16>(SQUARE * Vp);      // rows
  bf16* turned = cut.take<bf16>(SQUARE * Kp);      // [Kp][BLOCK] per block
  bf16* pairs = cut.take<bf16>(BLOCK * Kp);
  bf16* rows = cut.take<bf16>(wide * widest);
  bf16* q_turned = cut.take<bf16>(wide * Kp);
  bf16* q_pairs = cut.take<bf16>(wide * Kp);
  bf16* o_turned = cut.take<bf16>(wide * Vp);
  bf16* o_pairs = cut.take<bf16>(wide * Vp);
  float* S = cut.take<float>(BLOCK * wide);
  float* dS = cut.take<float>(BLOCK * wide);
  bf16* weights = cut.take<bf16>(BLOCK * wide);    // rows of keys
  bf16* changes = cut.take<bf16>(BLOCK * wide);    // rows of keys
  bf16* change_pairs = cut.take<bf16>(BLOCK * wide);
  float* minus = cut.take<float>(wide);            // log-sum-exp, base 2
  float* dot = cut.take<float>(wide);
  float* scratch = cut.take<float>(wide * widest);
  const int64_t block = d.before + first_key / BLOCK, query_block = d.before + first_query / BLOCK;
  float *dkeys, *dvalues;  // [BLOCK][padded] per block
  if (alone) {
    dkeys = cut.take<float>(SQUARE * Kp), dvalues = cut.take<float>(SQUARE * Vp);
  } else {
    dkeys = sums.keys + (block * s.groups + at.group * key_blocks) * BLOCK * Kp;
    dvalues = sums.values + (block * s.groups + at.group * key_blocks) * BLOCK * Vp;
  }
  if (at.queries == at.keys) {
    memset(dkeys, 0, sizeof(float) * key_blocks * BLOCK * Kp);
    memset(dvalues, 0, sizeof(float) * key_blocks * BLOCK * Vp);
  }
  for (int b = 0; b < key_blocks; b++) {
    int64_t key = first_key + b * BLOCK, count = std::min<int64_t>(BLOCK, d.length - key);
    copy_rows(k.data + d.row * k.row + (d.start + key) * k.token + at.group * k.head, k.token, count, s.size, Kp, keys + b * BLOCK * Kp);
    copy_rows(v.data + d.row * v.row + (d.start + key) * v.token + at.group * v.head, v.token, count, s.value_size, Vp, values + b * BLOCK * Vp);
    interleave(keys + b * BLOCK * Kp, BLOCK, Kp, pairs);
    transpose(pairs, BLOCK / 2, Kp, turned + b * BLOCK * Kp);
  }
  for (int part = 0; part < s.parts; part++) {
    const int heads = s.heads_of(part), columns = heads * BLOCK;
    const int64_t head = at.group * s.repeat + part * s.most;
    for (int b = 0; b < query_blocks; b++) {
      const int64_t query = first_query + b * BLOCK, count = std::min<int64_t>(BLOCK, d.length - query);
      copy_columns(q, d, head, heads, query, s.size, Kp, rows);
      transpose(rows, columns, Kp / 2, q_turned);
      interleave(rows, columns, Kp, q_pairs);
      copy_columns(dout, d, head, heads, query, s.value_size, Vp, rows);
      transpose(rows, columns, Vp / 2, o_turned);
      interleave(rows, columns, Vp, o_pairs);
      for (int h = 0; h < heads; h++)
        for (int64_t i = 0; i < BLOCK; i++) {
          int64_t from = (d.row * s.groups * s.repeat + head + h) * tokens + d.start + query + i;
          minus[h * BLOCK + i] = i < count ? lse[from] * LOG2E : 1e30f;  // no weight, no gradient
          dot[h * BLOCK + i] = i < count ? delta[from] : 0.f;
        }
      float* dqueries;  // [Kp][columns]
      if (alone)
        dqueries = (float*)cut.at;
      else
        dqueries = sums.queries + (((query_block + b) * s.groups + at.group) * s.parts + part) * Kp * wide;
      const bool fresh = at.queries == at.keys;
      if (fresh) memset(dqueries, 0, sizeof(float) * Kp * columns);
      for (int j = 0; j < key_blocks; j++) {
        const int64_t key = first_key + j * BLOCK;
        if (key > query || key + BLOCK <= s.first(query)) continue;
        product(BLOCK, columns, Kp, keys + j * BLOCK * Kp, q_turned, S, false);
        product(BLOCK, columns, Vp, values + j * BLOCK * Vp, o_turned, dS, false);
        const Seen see = seen(s, query, key);
        for (int c = 0; c < columns; c += 16) {
          Ints place = places(query, c);
          Floats less = load<Floats>(minus + c), about = load<Floats>(dot + c);
          for (int i = 0; i < BLOCK; i += 2) {
            Halves change[2];
            for (int n = 0; n < 2; n++) {
              int64_t here = (i + n) * columns + c;
              Floats p = exp2(load<Floats>(S + here) * (s.scale * LOG2E) - less);
              if (!see.whole) p = see(place, int(key) + i + n) ? p : Floats{};
              change[n] = narrow((load<Floats>(dS + here) - about) * p * s.scale);
              store(weights + here, narrow(p));
              store(changes + here, change[n]);
            }
            store(change_pairs + i * columns + 2 * c, paired(change[0], change[1]));
          }
        }
        product(BLOCK, Vp, columns, weights, o_pairs, dvalues + j * BLOCK * Vp, true);
        product(BLOCK, Kp, columns, changes, q_pairs, dkeys + j * BLOCK * Kp, true);
        product(Kp, columns, BLOCK, turned + j * BLOCK * Kp, change_pairs, dqueries, true);
      }
      if (at.keys == s.first(first_query) / SQUARE)  // the last of this row of squares
        write_columns(dqueries, dq, d, head, heads, query, s.size, Kp, scratch, [](int64_t) { return 1.f; });
    }
  }
  // the last square of this column: the next one starts behind the document, or where no query sees these keys
  int64_t next = first_query + SQUARE;
  bool last = next >= d.length || s.first(next) / SQUARE > at.keys;
  if (last)
    for (int b = 0; b < key_blocks; b++) {
      write_rows(dkeys + b * BLOCK * Kp, dk, d, at.group, first_key + b * BLOCK, s.size, Kp);
      write_rows(dvalues + b * BLOCK * Vp, dv, d, at.group, first_key + b * BLOCK, s.value_size, Vp);
    }
}

// documents of ids [rows, tokens]: runs of equal ids; padding (negative) gives zeros in `outputs`
std::vector<Document> documents(const int64_t* ids, int64_t rows, int64_t tokens,
                                std::initializer_list<std::pair<const Heads*, std::pair<int64_t, int64_t>>> outputs) {
  std::vector<Document> found;
  int64_t before = 0;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t t = 0; t < tokens;) {
      int64_t end = t + 1, id = ids[r * tokens + t];
      while (end < tokens && ids[r * tokens + end] == id) end++;
      if (id >= 0) {
        found.push_back({r, t, end - t, before});
        before += (end - t + BLOCK - 1) / BLOCK;
      } else {
        for (auto& [x, sizes] : outputs)
          for (int64_t i = t; i < end; i++)
            for (int64_t h = 0; h < sizes.first; h++)
              memset(x->data + r * x->row + i * x->token + h * x->head, 0, sizes.second * sizeof(bf16));
      }
      t = end;
    }
  return found;
}

template <class Work> void run(std::vector<Square>& squares, int threads, Work work) {
  std::stable_sort(squares.begin(), squares.end(), [](const Square& a, const Square& b) { return a.cost > b.cost; });
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (squares.size() > 1 && threads > 1)
  for (size_t i = 0; i < squares.size(); i++) work(squares[i]);
}

Heads heads(void* data, const int64_t* strides) { return {(bf16*)data, strides[0], strides[1], strides[2]}; }

}  // namespace

extern "C" {

// sizes: groups, query heads per group, head size, size of a value, window (0 = none)
// strides: of row, token and head, for q, k, v, out; lse [rows, heads, tokens]
void luthier_attention(void* q_, void* k_, void* v_, void* out_, float* lse, const int64_t* ids, int64_t rows,
                       int64_t tokens, const int64_t* sizes, const int64_t* strides, float scale, int threads) {
  Shape s(sizes, scale);
  Heads q = heads(q_, strides), k = heads(k_, strides + 3), v = heads(v_, strides + 6), out = heads(out_, strides + 9);
  auto docs = documents(ids, rows, tokens, {{&out, {s.groups * s.repeat, s.value_size}}});
  std::vector<Square> squares;
  for (int i = 0; i < int(docs.size()); i++)
    for (int64_t b = 0; b * SQUARE < docs[i].length; b++)
      for (int g = 0; g < s.groups; g++)
        for (int p = 0; p < s.parts; p++) {
          int64_t end = std::min((b + 1) * SQUARE, docs[i].length);
          squares.push_back({i, g, p, b, 0, end * end - s.first(b * SQUARE)});
        }
  run(squares, threads, [&](const Square& at) { forward_square(q, k, v, out, lse, tokens, s, docs[at.document], at); });
}

// strides: for q, k, v, out, dout, dq, dk, dv
void luthier_attention_backward(void* q_, void* k_, void* v_, void* out_, void* dout_, const float* lse, void* dq_,
                                void* dk_, void* dv_, const int64_t* ids, int64_t rows, int64_t tokens,
                                const int64_t* sizes, const int64_t* strides, float scale, int threads) {
  Shape s(sizes, scale);
  Heads q = heads(q_, strides), k = heads(k_, strides + 3), v = heads(v_, strides + 6), out = heads(out_, strides + 9);
  Heads dout = heads(dout_, strides + 12), dq = heads(dq_, strides + 15), dk = heads(dk_, strides + 18), dv = heads(dv_, strides + 21);
  const int64_t all_heads = s.groups * s.repeat;
  auto docs = documents(ids, rows, tokens, {{&dq, {all_heads, s.size}}, {&dk, {s.groups, s.size}}, {&dv, {s.groups, s.value_size}}});
  static std::mutex one_at_a_time;
  static Memory kept_delta, kept_sums;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  float* delta = kept_delta.take<float>(rows * all_heads * tokens);
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; r++)
    for (int64_t t = 0; t < tokens; t++) {
      if (ids[r * tokens + t] < 0) continue;
      for (int64_t h = 0; h < all_heads; h++) {
        const bf16* a = out.data + r * out.row + t * out.token + h * out.head;
        const bf16* b = dout.data + r * dout.row + t * dout.token + h * dout.head;
        Floats total = {};
        int64_t c = 0;
        for (; c + 16 <= s.value_size; c += 16) total += wide(a + c) * wide(b + c);
        float rest = sum(total);
        for (; c < s.value_size; c++) rest += one(a[c]) * one(b[c]);
        delta[(r * all_heads + h) * tokens + t] = rest;
      }
    }
  int64_t longest = 0;
  for (auto& d : docs) longest = std::max(longest, d.length);
  Sums sums{};
  if (longest > SQUARE) {
    int64_t blocks = docs.back().before + (docs.back().length + BLOCK - 1) / BLOCK;
    int64_t per_q = s.groups * s.parts * s.keys_padded * s.most * BLOCK, per_k = s.groups * BLOCK * s.keys_padded;
    int64_t per_v = s.groups * BLOCK * s.values_padded;
    float* memory = kept_sums.take<float>(blocks * (per_q + per_k + per_v));
    sums = {memory, memory + blocks * per_q, memory + blocks * (per_q + per_k)};
  }
  std::vector<Square> squares;
  for (int64_t diagonal = 0; diagonal * SQUARE < longest; diagonal++) {
    squares.clear();
    for (int i = 0; i < int(docs.size()); i++)
      for (int64_t b = diagonal; b * SQUARE < docs[i].length; b++)
        if (b - diagonal >= s.first(b * SQUARE) / SQUARE)
          for (int g = 0; g < s.groups; g++) squares.push_back({i, g, 0, b, b - diagonal, std::min<int64_t>(SQUARE, docs[i].length - b * SQUARE)});
    run(squares, threads, [&](const Square& at) {
      backward_square(q, k, v, dout, lse, delta, tokens, dq, dk, dv, sums, s, docs[at.document], at);
    });
  }
}

}  // extern "C"
