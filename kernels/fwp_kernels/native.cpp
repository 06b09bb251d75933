// The recurrence of fwp.core on a CPU, forward and backward, in chunks and token by token, float32.
//
//   S <- Diag(exp g_t) S + k_t x_t',   x_t = w_t v_t - e_t S'' a_t,   o_t = S' q_t      (' transposes; S' q reads after or before)
//
// No headers of PyTorch and no intrinsics: vectors are GCC's and Clang's vector extensions, so one source gives AVX-512,
// AVX2, SSE and NEON. A library is built for one pair of widths, KEYS and VALUES, the features rounded up to 32 and more,
// and for one kind of decay and of erasure.
//
// Within a chunk of C tokens, with S the state before it and F[i, j] what of token j's write is left at token i:
//   P = (Q K') * F,  L = -e (A K') * F strictly lower      a scores' row i decays up to token i, or to the one before
//   X = (1 - L)^-1 (w V - e As S)                          As = A times the decay from the chunk's start
//   O = Qs S + P X,  next S = lambda S + Ks' X             Ks = K times the decay to the chunk's end
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <new>
#include <utility>

// ---------------------------------------------------------------------------------------------------------- vectors

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define INL inline __attribute__((always_inline))
#define NOW __attribute__((always_inline))  // for lambdas
#define BUF(name, size) float *const name = room.take(size)

// Names of this library alone: libraries of other widths are loaded beside it.
namespace {

constexpr int W = WIDTH;                  // floats in a vector
constexpr int MR = W == 8 ? 6 : 8;        // rows and
constexpr int NV = 2, NR = NV * W;        // vectors of a tile of a product: it leaves a few registers free
constexpr int KP = KEYS, VP = VALUES;
constexpr int GROUP = 4;                  // heads that are walked together: rows [T, H, D] are then read page by page
static_assert(KP % 32 == 0 && VP % 32 == 0, "widths");
typedef float vf __attribute__((vector_size(4 * W)));
typedef int vi __attribute__((vector_size(4 * W)));
typedef float vf_anywhere __attribute__((vector_size(4 * W), aligned(4), may_alias));

static INL vf ld(const float *p) { return *(const vf_anywhere *)p; }
static INL void st(float *p, vf x) { *(vf_anywhere *)p = x; }
static INL float total(vf x) { float s = 0; for (int l = 0; l < W; l++) s += x[l]; return s; }

// Loops whose index is a constant in every turn. With plain loops GCC may leave an array of vectors in memory, which is
// three times slower. After these it is registers at once.
template <class F, int... I> static INL void each(F f, std::integer_sequence<int, I...>) { (f(std::integral_constant<int, I>()), ...); }
template <int N, class F> static INL void each(F f) { each(f, std::make_integer_sequence<int, N>()); }

static INL vf lanes() { vf r = {}; each<W>([&](auto l) NOW { r[(int)l] = (float)(int)l; }); return r; }

// exp(x) for x <= 0 or small, within about one unit in the last place, and exactly 0 below -87
static INL vf vexp(vf x) {
  x = x < -104.f ? (vf){} - 104.f : x;
  vf t = x * 1.44269504f + 12582912.f, n = t - 12582912.f;  // n = round(x / ln 2)
  vf r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  p = (vf)((vi)p + (((vi)t - 0x4B400000) << 23));
  return x < -87.f ? (vf){} : p;
}

// Decays make denormal numbers, and products with those take some hundred cycles each. They are 0 while the kernel runs.
struct FlushDenormals {
#if defined(__SSE__)
  unsigned old = __builtin_ia32_stmxcsr();
  FlushDenormals() { __builtin_ia32_ldmxcsr(old | 0x8040); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(old); }
#elif defined(__aarch64__)
  unsigned long old;
  FlushDenormals() { asm volatile("mrs %0, fpcr" : "=r"(old)); asm volatile("msr fpcr, %0" ::"r"(old | 1ul << 24)); }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(old)); }
#endif
};

// Scratch memory. It is passed by value, so that what a function takes is free again when it returns.
struct Room {
  float *at;
  INL float *take(long size) { float *x = at; at += (size + 15) / 16 * 16; return x; }
  template <class T> INL T &one() { return *new (take(sizeof(T) / 4 + 1)) T; }
  static constexpr long size = (GROUP + 20) * KP * VP + 64 * 32 * (KP + VP) + (1 << 15);
};

// Rooms that no call uses at the moment.
struct Lease {
  static std::atomic<float *> *spare() { static std::atomic<float *> slots[64]; return slots; }
  float *at = nullptr;
  Lease() {
    for (int i = 0; i < 64 && !at; i++) at = spare()[i].exchange(nullptr);
    if (!at) at = (float *)std::aligned_alloc(64, Room::size * 4);
  }
  ~Lease() {
    for (int i = 0; i < 64; i++) { float *empty = nullptr; if (spare()[i].compare_exchange_strong(empty, at)) return; }
    std::free(at);
  }
};

// --------------------------------------------------------------------------------------------------------- products

// M x N vectors of a matrix, in registers
template <int M, int N> struct Tile {
  static constexpr int rows = M;
  vf c[M][N];
  template <class F> static INL void all(F f) { each<M>([&](auto m) NOW { each<N>([&](auto n) NOW { f(m, n); }); }); }
  INL void zero() { all([&](auto m, auto n) NOW { c[m][n] = (vf){}; }); }
  INL void load(const float *p, long s) { all([&](auto m, auto n) NOW { c[m][n] = ld(p + m * s + n * W); }); }
  INL void store(float *p, long s) const { all([&](auto m, auto n) NOW { st(p + m * s + n * W, c[m][n]); }); }
  INL void scale(const float *f) { all([&](auto m, auto n) NOW { c[m][n] *= f[m]; }); }
  // c += A B over `len` steps. A is read one number at a time, by rows (a[m, k]) or with COL by columns (a[k, m]), so it
  // needs no packing; B is read by rows (b[k, n]).
  template <bool COL = false> INL void mac(const float *a, long sa, const float *b, long sb, long len) {
    for (long k = 0; k < len; k++) {
      const float *y = a + (COL ? k * sa : k), *x = b + k * sb;
      vf v[N];
      each<N>([&](auto n) NOW { v[n] = ld(x + n * W); });
      each<M>([&](auto m) NOW { float f = y[COL ? (long)m : m * sa]; each<N>([&](auto n) NOW { c[m][n] += f * v[n]; }); });
    }
  }
  // c = (1 - L)^-1 c with L strictly lower; solve_upper: with its transpose
  INL void solve_lower(const float *l, long s) {
    each<M>([&](auto m) NOW { each<m>([&](auto j) NOW { each<N>([&](auto n) NOW { c[m][n] += l[m * s + j] * c[j][n]; }); }); });
  }
  INL void solve_upper(const float *l, long s) {
    each<M>([&](auto r) NOW {
      constexpr int m = M - 1 - r;
      each<r>([&](auto x) NOW { constexpr int j = M - 1 - x; each<N>([&](auto n) NOW { c[m][n] += l[j * s + m] * c[j][n]; }); });
    });
  }
};

// f(tile, first row) for every tile of ROWS rows, upwards or downwards
template <int ROWS, class F> static INL void up(F f) {
  for (long i = 0; i + MR <= ROWS; i += MR) { Tile<MR, NV> t; f(t, i); }
  if constexpr (ROWS % MR != 0) { Tile<ROWS % MR, NV> t; f(t, (long)ROWS - ROWS % MR); }
}
template <int ROWS, class F> static INL void down(F f) {
  if constexpr (ROWS % MR != 0) { Tile<ROWS % MR, NV> t; f(t, (long)ROWS - ROWS % MR); }
  for (long i = ROWS / MR * MR - MR; i >= 0; i -= MR) { Tile<MR, NV> t; f(t, i); }
}
// out [R, N] (+)= A B, A [R, len] by rows or by columns [len, R], B [len, N]
template <int R, int N, int SA, bool COL, bool ADD> static INL void product(float *out, const float *a, const float *b, long len) {
  for (int j = 0; j < N; j += NR) up<R>([&](auto &t, long i) NOW {
    if constexpr (ADD) t.load(out + i * N + j, N); else t.zero();
    t.template mac<COL>(a + (COL ? i : i * SA), SA, b + j, N, len);
    t.store(out + i * N + j, N);
  });
}

// W x W in registers, by exchanging ever smaller blocks
template <int H, int... L> static INL void exchange(vf &a, vf &b, std::integer_sequence<int, L...>) {
  vf x = __builtin_shufflevector(a, b, (L & H ? W + L - H : L)...);
  vf y = __builtin_shufflevector(a, b, (L & H ? W + L : L + H)...);
  a = x; b = y;
}
template <int H> static INL void transpose(vf *r) {
  each<W>([&](auto i) NOW { if constexpr (!(i & H)) exchange<H>(r[i], r[i + H], std::make_integer_sequence<int, W>()); });
  if constexpr (H > 1) transpose<H / 2>(r);
}
template <int R, int N> static void transpose(float *out, const float *in) {  // in [R, N], out [N, R]
  for (int i = 0; i < R; i += W) for (int j = 0; j < N; j += W) {
    vf r[W];
    each<W>([&](auto m) NOW { r[m] = ld(in + (i + m) * N + j); });
    transpose<W / 2>(r);
    each<W>([&](auto m) NOW { st(out + (j + m) * R + i, r[m]); });
  }
}
template <int N, class F> static INL void map(float *out, F f) { for (int i = 0; i < N; i += W) st(out + i, f(i)); }
// out = row t of in [C, N] times f[t]
template <int C, int N> static INL void scale_rows(float *out, const float *in, const float *f) {
  for (int t = 0; t < C; t++) map<N>(out + t * N, [&](int d) NOW { return f[t] * ld(in + t * N + d); });
}

// p[i, j] = a_i b_j for j up to the end of i's block of W; bt is b transposed [N, C]. Blocks beyond are not written.
template <int C, int N> static void lower_scores(float *p, const float *a, const float *bt) {
  for (int i = 0; i < C; i += W) for (int j = 0; j <= i; j += W) for (int r = i; r < i + W; r += W / 2) {
    Tile<W / 2, 1> t; t.zero(); t.mac(a + r * N, N, bt + j, C, N); t.store(p + r * C + j, C);
  }
}
// p *= f row by row, and 0 from the diagonal on (STRICT) or beyond it: tiles read rows that are not aligned to W
template <int C, bool STRICT> static INL void cut(float *p, const float *f) {
  for (int i = 0; i < C; i++) {
    float at = (float)(i % W) - STRICT, *x = p + i * C;
    for (int j = 0; j < i / W * W; j += W) st(x + j, f[i] * ld(x + j));
    st(x + i / W * W, lanes() <= at ? f[i] * ld(x + i / W * W) : (vf){});
    for (int j = i / W * W + W; j < C; j += W) st(x + j, (vf){});
  }
}

// -------------------------------------------------------------------------------------------------------- interface

// A tensor [N, T, heads, features]: strides in numbers; `share` neighbouring state heads use one of its heads.
struct Rows { float *at; long batch, time, head, inner, share; };

// What Python hands over. Pointers may be null: e, w, g, a, S: see fwp.core; kept, xs: nothing is kept for the backward pass.
struct Problem {
  long sequences, heads, queries, keys, values;  // N, H, query heads per state head, K, V
  long read_before, erase_before;                // whether o, and the erase key, meet S before the token's own decay
  long every, part, parts;                       // chunks between two kept states; which share of the units, of how many
  const long *first, *length, *chunk, *segment;  // of each sequence: first token, tokens; chunks and segments before it
  Rows q, k, v, a, e, w, g, o;
  float *S, *end;                                // [N, H, K, V]
  float *kept, *xs;                              // [segments, H, KP, VP], [chunks, H, C, VP]
  Rows dq, dk, dv, da, de, dw, dg;               // gradients: dq [.., H x queries, K], all others one per state head
  Rows dout;
  float *dend, *dS;                              // [N, H, K, V]
};

static INL float *row(const Problem &p, const Rows &x, long n, long t, long h) {
  return x.at + n * x.batch + (p.first[n] + t) * x.time + h / x.share * x.head;
}
// rows [n, width] of a tensor to [C, N] side by side, the rest 0; a stride of 0 repeats one number
template <int C, int N> static INL void pack(float *out, const Rows &x, const float *in, long n, long width) {
  if (x.inner == 1 && width == N) for (long t = 0; t < n; t++) map<N>(out + t * N, [&](int d) NOW { return ld(in + t * x.time + d); });
  else for (long t = 0; t < n; t++) {
    for (long d = 0; d < width; d++) out[t * N + d] = in[t * x.time + d * x.inner];
    for (long d = width; d < N; d++) out[t * N + d] = 0;
  }
  if (n < C) memset(out + n * N, 0, (C - n) * N * 4);
}
template <int C, int N> static INL void unpack(const Rows &x, float *out, const float *in, long n, long width) {
  if (width == N) for (long t = 0; t < n; t++) map<N>(out + t * x.time, [&](int d) NOW { return ld(in + t * N + d); });
  else for (long t = 0; t < n; t++) memcpy(out + t * x.time, in + t * N, width * 4);
}
template <int C> static INL void numbers(float *out, const Rows &x, const float *in, long n, float missing) {  // a gate per head
  for (long t = 0; t < C; t++) out[t] = t >= n ? 0 : x.at ? in[t * x.time] : missing;
}
static void padded(float *out, const float *S, long K, long V) {  // [K, V] to [KP, VP]; null is 0
  if (!S || K < KP || V < VP) memset(out, 0, KP * VP * 4);
  if (S) for (long i = 0; i < K; i++) memcpy(out + i * VP, S + i * V, V * 4);
}
static void cropped(float *S, const float *in, long K, long V) { for (long i = 0; i < K; i++) memcpy(S + i * V, in + i * VP, V * 4); }
static INL double limited(float g) { return g < -1e4f ? -1e4 : g; }  // exp(-1e4) is 0 too, and its sums stay finite

// ------------------------------------------------------------------------------------------------------------ decays

template <int DECAY, int C> struct Decays {
  // DECAY 1: G the sums of g. `here` is exp(G_i), `before` exp(G_(i-1)), `rest` exp(G_C - G_i).
  alignas(64) float here[C], before[C], rest[C];
  double G[C + 1];
  float whole;  // exp(G_C)
  // DECAY 2: the decay of each token and channel, exp(g)
  alignas(64) float alpha[DECAY == 2 ? C * KP : 1], fade[DECAY == 2 ? KP : 1];

  void read(const Problem &p, long n, long t, long h, long count) {
    if constexpr (DECAY == 1) {
      const float *g = row(p, p.g, n, t, h);
      G[0] = 0;
      for (long i = 0; i < C; i++) G[i + 1] = G[i] + (i < count ? limited(g[i * p.g.time]) : 0);
      for (int i = 0; i < C; i++) { here[i] = (float)G[i + 1]; before[i] = (float)G[i]; rest[i] = (float)(G[C] - G[i + 1]); }
      for (float *x : {here, before, rest}) map<C>(x, [&](int i) NOW { return vexp(ld(x + i)); });
      whole = here[C - 1];
    } else if constexpr (DECAY == 2) {
      pack<C, KP>(alpha, p.g, row(p, p.g, n, t, h), count, p.keys);
      map<C * KP>(alpha, [&](int i) NOW { return vexp(ld(alpha + i)); });
      for (int d = 0; d < KP; d += W) {
        vf s = (vf){} + 1.f;
        for (int i = 0; i < C; i++) s *= ld(alpha + i * KP + d);
        st(fade + d, s);
      }
    }
  }
  // out = in [C, KP] times the decay from the chunk's start to each token, that of the token included or not
  void since_start(float *out, const float *in, bool own) const {
    if (DECAY == 0 && out != in) memcpy(out, in, C * KP * 4);
    if constexpr (DECAY == 1) scale_rows<C, KP>(out, in, own ? here : before);
    if constexpr (DECAY == 2) for (int d = 0; d < KP; d += W) {
      vf s = (vf){} + 1.f;
      for (int x = d; x < C * KP; x += KP) {
        if (own) s *= ld(alpha + x);
        st(out + x, ld(in + x) * s);
        if (!own) s *= ld(alpha + x);
      }
    }
  }
  // out = in [C, KP] times the decay from after each token to the chunk's end
  void to_end(float *out, const float *in) const {
    if (DECAY == 0 && out != in) memcpy(out, in, C * KP * 4);
    if constexpr (DECAY == 1) scale_rows<C, KP>(out, in, rest);
    if constexpr (DECAY == 2) for (int d = 0; d < KP; d += W) {
      vf s = (vf){} + 1.f;
      for (int x = (C - 1) * KP + d; x >= 0; x -= KP) { st(out + x, ld(in + x) * s); s *= ld(alpha + x); }
    }
  }
  // F[i, j] = exp(G_i - G_j), or exp(G_(i-1) - G_j) without i's own decay, for j <= i; DECAY 1. Both factors of the
  // blocks below the diagonal are at most 1, so nothing overflows.
  void ratios(float *out, bool own) const {
    for (int r = 0; r < C; r += W) {
      alignas(64) float w[C];
      for (int m = 0; m < W; m++) {
        double at = G[r + m + own];
        for (int j = 0; j < r + W; j++) { double d = at - G[j + 1]; w[j] = d > 0 ? 0 : (float)d; }
        for (int j = 0; j < r + W; j += W) st(out + (r + m) * C + j, vexp(ld(w + j)));
      }
    }
  }
  // p[i, j] = f_i sum_d q[i, d] k[j, d] F[i, j, d], for j <= i, or j < i if STRICT
  template <bool STRICT> void scores(float *p, const float *q, const float *k, const float *kt, const float *f, bool own) const {
    if constexpr (DECAY == 2) return channel_scores<STRICT>(p, q, kt, f, own);
    lower_scores<C, KP>(p, q, kt);
    cut<C, STRICT>(p, f);
    if constexpr (DECAY == 1) weigh(p, own);
  }
  void weigh(float *p, bool own) const {  // p *= F
    if constexpr (DECAY == 1) {
      alignas(64) float F[C * C];
      ratios(F, own);
      for (int i = 0; i < C; i++) for (int j = 0; j <= i; j += W) st(p + i * C + j, ld(p + i * C + j) * ld(F + i * C + j));
    }
  }
  // Lanes are keys, which fade token by token; some rows at a time, so that their sums stay in registers.
  template <bool STRICT> void channel_scores(float *p, const float *q, const float *kt, const float *f, bool own) const {
    constexpr int L = C / W, M = 8;
    alignas(64) float middle[KP * C];
    memcpy(middle, kt, KP * C * 4);
    for (int first = 0; first < C; first += M) {
      vf x[M][L];
      each<M>([&](auto m) NOW { each<L>([&](auto l) NOW { x[m][l] = (vf){}; }); });
      for (int d = 0; d < KP; d++) {
        vf w[L];
        each<L>([&](auto l) NOW { w[l] = ld(middle + d * C + l * W); });
        each<M>([&](auto m) NOW {
          int i = first + m;
          float y = q[i * KP + d], a = alpha[i * KP + d];
          each<L>([&](auto l) NOW {
            vf faded = lanes() + (float)(l * W) < (float)i ? w[l] * a : w[l];
            x[m][l] += y * (own ? faded : w[l]);
            w[l] = faded;
          });
        });
        each<L>([&](auto l) NOW { st(middle + d * C + l * W, w[l]); });
      }
      each<M>([&](auto m) NOW { each<L>([&](auto l) NOW {
        int i = first + m;
        st(p + i * C + l * W, lanes() + (float)(l * W) <= (float)(i - STRICT) ? f[i] * x[m][l] : (vf){});
      }); });
    }
  }
  // The gradients of scores for those of q and k: dq_i += sum_j p[i, j] k_j F[i, j], dk_j += sum_i f_i p[i, j] q_i F[i, j],
  // where p is already times F if DECAY is 1, and strictly lower or lower
  void spread(float *dq, float *dk, const float *p, const float *q, const float *k, const float *f, bool own) const {
    alignas(64) float fp[C * C];
    for (int i = 0; i < C; i++) map<C>(fp + i * C, [&](int j) NOW { return f[i] * ld(p + i * C + j); });
    if constexpr (DECAY != 2) {
      for (int j = 0; j < KP; j += NR) {
        up<C>([&](auto &t, long i) NOW {
          t.load(dq + i * KP + j, KP);
          t.mac(p + i * C, C, k + j, KP, i + t.rows);
          t.store(dq + i * KP + j, KP);
        });
        up<C>([&](auto &t, long i) NOW {
          t.load(dk + i * KP + j, KP);
          t.template mac<true>(fp + i * C + i, C, q + i * KP + j, KP, C - i);
          t.store(dk + i * KP + j, KP);
        });
      }
    } else for (int d = 0; d < KP; d += W) {
      vf x[C];
      for (int i = 0; i < C; i++) x[i] = ld(k + i * KP + d);
      for (int i = 0; i < C; i++) {  // x: the keys, faded up to token i
        vf a = ld(alpha + i * KP + d), s = ld(dq + i * KP + d);
        for (int j = 0; j <= i; j++) {
          vf faded = j < i ? x[j] * a : x[j];
          s += p[i * C + j] * (own ? faded : x[j]);
          x[j] = faded;
        }
        st(dq + i * KP + d, s);
      }
      for (int j = 0; j < C; j++) x[j] = (vf){};
      vf next = {};  // the decay of token i + 1
      for (int i = C - 1; i >= 0; i--) {  // x: what later tokens give to the keys, faded back to token i
        vf y = ld(q + i * KP + d), a = ld(alpha + i * KP + d);
        for (int j = 0; j <= i; j++) {
          vf z = fp[i * C + j] * y;
          x[j] = own ? x[j] * next + z : (j < i ? x[j] * a + z : x[j] + z);
        }
        next = a;
      }
      for (int j = 0; j < C; j++) st(dk + j * KP + d, ld(dk + j * KP + d) + x[j]);
    }
  }
  // rows of S [KP, VP] times the decay of the whole chunk
  INL float kept_of(int row) const { return DECAY == 0 ? 1 : DECAY == 1 ? whole : fade[row]; }
};

// ------------------------------------------------------------------------------------------------------------ chunks

// DECAY: 0 none, 1 per head, 2 per key channel. ERASE: 0 nothing, 1 along k, 2 along a.
template <int DECAY, int ERASE> struct Cell {
  static constexpr int C = DECAY == 2 ? 16 : 32;
  using D = Decays<DECAY, C>;

  struct Written {  // what a chunk's writes need: its keys, decays and the system that the written values solve
    D decays;
    alignas(64) float K[C * KP], Kt[KP * C], Ks[C * KP], e[C], w[C];
    alignas(64) float A[ERASE == 2 ? C * KP : 1], As[ERASE ? C * KP : 1], L[C * C];
    const float *a() const { return ERASE == 2 ? A : K; }

    void read(const Problem &p, long n, long t, long h, long count) {
      pack<C, KP>(K, p.k, row(p, p.k, n, t, h), count, p.keys);
      decays.read(p, n, t, h, count);
      numbers<C>(w, p.w, p.w.at ? row(p, p.w, n, t, h) : nullptr, count, 1);
      decays.to_end(Ks, K);
    }
    void system(const Problem &p, long n, long t, long h, long count) {
      transpose<C, KP>(Kt, K);
      if constexpr (ERASE != 0) {
        float minus[C];
        if constexpr (ERASE == 2) pack<C, KP>(A, p.a, row(p, p.a, n, t, h), count, p.keys);
        numbers<C>(e, p.e, p.e.at ? row(p, p.e, n, t, h) : nullptr, count, 1);
        for (int i = 0; i < C; i++) minus[i] = -e[i];
        decays.since_start(As, a(), !p.erase_before);
        decays.template scores<true>(L, a(), K, Kt, minus, !p.erase_before);
      }
    }
  };

  static void scores(const Problem &p, const Written &b, float *P, const float *Q) {
    alignas(64) float ones[C];
    for (float &x : ones) x = 1;
    if (p.read_before) b.decays.template scores<true>(P, Q, b.K, b.Kt, ones, false);
    else b.decays.template scores<false>(P, Q, b.K, b.Kt, ones, true);
  }
  // next = lambda S + Ks' X; they may be the same
  static void advance(const Written &b, const float *S, const float *X, float *next) {
    for (int j = 0; j < VP; j += NR) up<KP>([&](auto &t, long i) NOW {
      t.load(S + i * VP + j, VP);
      if constexpr (DECAY != 0) t.all([&](auto m, auto x) NOW { t.c[m][x] *= b.decays.kept_of(i + m); });
      t.template mac<true>(b.Ks + i, KP, X + j, VP, C);
      t.store(next + i * VP + j, VP);
    });
  }

  // X [C, VP] is what the chunk writes. S becomes the state after it.
  static void forward(const Problem &p, long n, long t, long h, long count, float *S, float *X, Room room) {
    Written &b = room.one<Written>();
    BUF(V, C * VP); BUF(Q, C * KP); BUF(Qs, C * KP); BUF(P, C * C); BUF(O, C * VP);
    b.read(p, n, t, h, count);
    b.system(p, n, t, h, count);
    pack<C, VP>(V, p.v, row(p, p.v, n, t, h), count, p.values);
    if constexpr (ERASE == 0) scale_rows<C, VP>(X, V, b.w);
    else for (int j = 0; j < VP; j += NR) up<C>([&](auto &t, long i) NOW {  // the substitution ends each tile's product
      t.zero();
      t.mac(b.As + i * KP, KP, S + j, VP, KP);
      t.all([&](auto m, auto x) NOW { t.c[m][x] = b.w[i + m] * ld(V + (i + m) * VP + j + x * W) - b.e[i + m] * t.c[m][x]; });
      t.mac(b.L + i * C, C, X + j, VP, i);
      t.solve_lower(b.L + i * C + i, C);
      t.store(X + i * VP + j, VP);
    });
    for (long r = 0; r < p.queries; r++) {
      long hq = h * p.queries + r;
      pack<C, KP>(Q, p.q, row(p, p.q, n, t, hq), count, p.keys);
      b.decays.since_start(Qs, Q, !p.read_before);
      scores(p, b, P, Q);
      for (int j = 0; j < VP; j += NR) up<C>([&](auto &t, long i) NOW {
        t.zero();
        t.mac(Qs + i * KP, KP, S + j, VP, KP);
        t.mac(P + i * C, C, X + j, VP, i + t.rows);
        t.store(O + i * VP + j, VP);
      });
      unpack<C, VP>(p.o, row(p, p.o, n, t, hq), O, count, p.values);
    }
    advance(b, S, X, S);
  }

  // G [KP, VP]: gradient of the state after the chunk, becomes that of the state S before it. c: <S, G> there, over all
  // or per channel, becomes that of the state before. Nothing is divided by e: with E_t the gradient of a_t over e_t,
  // de_t = a_t E_t. A decay's gradient is <S, G> after it: reads after it add q dq and a da, the write takes k dk.
  static void backward(const Problem &p, long n, long t, long h, long count, const float *S, const float *X, float *G, float *c, Room room) {
    Written &b = room.one<Written>();
    BUF(V, C * VP); BUF(Q, C * KP); BUF(Qs, C * KP); BUF(O, C * VP); BUF(Y, C * VP); BUF(Z, C * VP); BUF(Xt, VP * C);
    BUF(St, VP * KP); BUF(Gt, VP * KP); BUF(P, C * C); BUF(A, C * C); BUF(dQ, C * KP); BUF(dK, C * KP); BUF(dA, C * KP);
    BUF(next, KP * VP); BUF(seen, C * KP);  // seen: q dq over the query heads
    b.read(p, n, t, h, count);
    b.system(p, n, t, h, count);
    transpose<C, VP>(Xt, X);
    transpose<KP, VP>(St, S);
    transpose<KP, VP>(Gt, G);
    product<C, KP, VP, false, false>(dK, X, Gt, VP);
    b.decays.to_end(dK, dK);
    product<C, VP, KP, false, false>(Y, b.Ks, G, KP);
    for (int j = 0; j < VP; j += NR) up<KP>([&](auto &t, long i) NOW {
      t.load(G + i * VP + j, VP);
      if constexpr (DECAY != 0) t.all([&](auto m, auto x) NOW { t.c[m][x] *= b.decays.kept_of(i + m); });
      t.store(next + i * VP + j, VP);
    });
    memset(seen, 0, C * KP * 4);
    alignas(64) float ones[C];
    for (float &x : ones) x = 1;
    for (long r = 0; r < p.queries; r++) {
      long hq = h * p.queries + r;
      pack<C, KP>(Q, p.q, row(p, p.q, n, t, hq), count, p.keys);
      pack<C, VP>(O, p.dout, row(p, p.dout, n, t, hq), count, p.values);
      b.decays.since_start(Qs, Q, !p.read_before);
      scores(p, b, P, Q);
      for (int j = 0; j < VP; j += NR) up<C>([&](auto &t, long i) NOW {  // Y += P' dO
        t.load(Y + i * VP + j, VP);
        t.template mac<true>(P + i * C + i, C, O + i * VP + j, VP, C - i);
        t.store(Y + i * VP + j, VP);
      });
      product<KP, VP, KP, true, true>(next, Qs, O, C);
      product<C, KP, VP, false, false>(dQ, O, St, VP);
      b.decays.since_start(dQ, dQ, !p.read_before);
      lower_scores<C, VP>(A, O, Xt);
      if (p.read_before) cut<C, true>(A, ones); else cut<C, false>(A, ones);
      b.decays.weigh(A, !p.read_before);
      b.decays.spread(dQ, dK, A, Q, b.K, ones, !p.read_before);
      for (int i = 0; i < C * KP; i += W) st(seen + i, ld(seen + i) + ld(Q + i) * ld(dQ + i));
      unpack<C, KP>(p.dq, row(p, p.dq, n, t, hq), dQ, count, p.keys);
    }
    pack<C, VP>(V, p.v, row(p, p.v, n, t, h), count, p.values);
    if constexpr (ERASE != 0) {
      float minus[C];
      for (int i = 0; i < C; i++) minus[i] = -1;
      for (int j = 0; j < VP; j += NR) down<C>([&](auto &t, long i) NOW {  // Y = (1 - L')^-1 Y
        constexpr int M = std::remove_reference_t<decltype(t)>::rows;
        t.load(Y + i * VP + j, VP);
        t.template mac<true>(b.L + (i + M) * C + i, C, Y + (i + M) * VP + j, VP, C - i - M);
        t.solve_upper(b.L + i * C + i, C);
        t.store(Y + i * VP + j, VP);
      });
      for (int i = 0; i < C; i++) map<VP>(Z + i * VP, [&](int d) NOW { return -b.e[i] * ld(Y + i * VP + d); });
      product<KP, VP, KP, true, true>(next, b.As, Z, C);
      product<C, KP, VP, false, false>(dA, Y, St, VP);
      for (int i = 0; i < C * KP; i += W) st(dA + i, -ld(dA + i));
      b.decays.since_start(dA, dA, !p.erase_before);
      lower_scores<C, VP>(A, Y, Xt);
      cut<C, true>(A, minus);
      b.decays.weigh(A, !p.erase_before);
      b.decays.spread(dA, dK, A, b.a(), b.K, b.e, !p.erase_before);
    }
    // what is left is per token
    BUF(keep, C * KP);  // k dk
    for (int i = 0; i < C * KP; i += W) st(keep + i, ld(b.K + i) * ld(dK + i));
    vf sums[KP / W];
    double sum = *c;
    if constexpr (DECAY == 2) for (int d = 0; d < KP; d += W) sums[d / W] = ld(c + d);
    for (long i = count - 1; i >= 0; i--) {
      vf dw = {}, erased = {};
      float e = ERASE ? b.e[i] : 0;
      for (int d = 0; d < VP; d += W) dw += ld(Y + i * VP + d) * ld(V + i * VP + d);
      if constexpr (ERASE != 0) for (int d = 0; d < KP; d += W) erased += ld(b.a() + i * KP + d) * ld(dA + i * KP + d);
      float ada = ERASE ? total(erased) : 0;
      if (p.dw.at) *(row(p, p.dw, n, t + i, h)) = total(dw);
      if (ERASE && p.de.at) *(row(p, p.de, n, t + i, h)) = ada;
      if constexpr (DECAY == 1) {
        vf x = {}, y = {};
        for (int d = 0; d < KP; d += W) { x += ld(seen + i * KP + d); y += ld(keep + i * KP + d); }
        float after = p.read_before ? 0 : total(x), before = p.read_before ? total(x) : 0;
        sum += after - total(y) + (p.erase_before ? 0 : e * ada);
        *(row(p, p.dg, n, t + i, h)) = (float)sum;
        sum += before + (p.erase_before ? e * ada : 0);
      }
      if constexpr (DECAY == 2) {
        float line[KP];
        for (int d = 0; d < KP; d += W) {
          long at = i * KP + d;
          vf x = ld(seen + at), z = {};
          if constexpr (ERASE != 0) z = e * ld(b.a() + at) * ld(dA + at);
          vf s = sums[d / W] - ld(keep + at);
          if (!p.read_before) s += x;
          if (!p.erase_before) s += z;
          st(line + d, s);
          if (p.read_before) s += x;
          if (p.erase_before) s += z;
          sums[d / W] = s;
        }
        memcpy(row(p, p.dg, n, t + i, h), line, p.keys * 4);
      }
    }
    for (int i = 0; i < C; i++) map<VP>(Y + i * VP, [&](int d) NOW { return b.w[i] * ld(Y + i * VP + d); });
    unpack<C, VP>(p.dv, row(p, p.dv, n, t, h), Y, count, p.values);
    if constexpr (ERASE != 0) {
      float *to = ERASE == 2 ? dA : dK;
      for (int i = 0; i < C; i++) for (int d = 0; d < KP; d += W) {
        vf x = b.e[i] * ld(dA + i * KP + d);
        st(to + i * KP + d, ERASE == 2 ? x : x + ld(dK + i * KP + d));
      }
      if constexpr (ERASE == 2) unpack<C, KP>(p.da, row(p, p.da, n, t, h), dA, count, p.keys);
    }
    unpack<C, KP>(p.dk, row(p, p.dk, n, t, h), dK, count, p.keys);
    memcpy(G, next, KP * VP * 4);
    if constexpr (DECAY == 1) {
      vf s[4] = {};
      for (int i = 0; i < KP * VP; i += 4 * W) each<4>([&](auto x) NOW { s[x] += ld(S + i + x * W) * ld(G + i + x * W); });
      *c = total(s[0] + s[1] + (s[2] + s[3]));
    }
    if constexpr (DECAY == 2) for (int i = 0; i < KP; i++) {
      vf s = {};
      for (int d = 0; d < VP; d += W) s += ld(S + i * VP + d) * ld(G + i * VP + d);
      c[i] = total(s);
    }
  }

  // One token at a time: two passes over S where something is erased, else one.
  static void tokens(const Problem &p, long n, long h, float *S, Room room) {
    BUF(k, KP); BUF(a, KP); BUF(alpha, KP); BUF(q, KP); BUF(x, VP); BUF(o, VP);
    for (long t = 0; t < p.length[n]; t++) {
      pack<1, KP>(k, p.k, row(p, p.k, n, t, h), 1, p.keys);
      pack<1, VP>(x, p.v, row(p, p.v, n, t, h), 1, p.values);
      if constexpr (ERASE == 2) pack<1, KP>(a, p.a, row(p, p.a, n, t, h), 1, p.keys);
      float w = p.w.at ? *row(p, p.w, n, t, h) : 1, e = ERASE && p.e.at ? *row(p, p.e, n, t, h) : 1;
      if constexpr (DECAY == 1) {
        float g[W] = {*row(p, p.g, n, t, h)};
        vf f = vexp((vf){} + g[0]);
        map<KP>(alpha, [&](int) NOW { return f; });
      }
      if constexpr (DECAY == 2) {
        pack<1, KP>(alpha, p.g, row(p, p.g, n, t, h), 1, p.keys);
        map<KP>(alpha, [&](int d) NOW { return vexp(ld(alpha + d)); });
      }
      auto read = [&](float *out, const float *y, bool decayed) NOW {  // out = S' y
        for (int j = 0; j < VP; j += NR) {
          vf s[NV] = {};
          for (int i = 0; i < p.keys; i++) {
            float f = DECAY && decayed ? y[i] * alpha[i] : y[i];
            each<NV>([&](auto z) NOW { s[z] += f * ld(S + i * VP + j + z * W); });
          }
          each<NV>([&](auto z) NOW { st(out + j + z * W, s[z]); });
        }
      };
      auto say = [&](long r) NOW {
        long hq = h * p.queries + r;
        pack<1, KP>(q, p.q, row(p, p.q, n, t, hq), 1, p.keys);
        read(o, q, false);
        memcpy(row(p, p.o, n, t, hq), o, p.values * 4);
      };
      if (p.read_before) for (long r = 0; r < p.queries; r++) say(r);
      if constexpr (ERASE != 0) {
        read(o, ERASE == 2 ? a : k, !p.erase_before);
        map<VP>(x, [&](int d) NOW { return w * ld(x + d) - e * ld(o + d); });
      } else map<VP>(x, [&](int d) NOW { return w * ld(x + d); });
      for (int i = 0; i < p.keys; i++) map<VP>(S + i * VP, [&](int d) NOW {
        vf s = ld(S + i * VP + d);
        return (DECAY ? alpha[i] * s : s) + k[i] * ld(x + d);
      });
      if (!p.read_before) for (long r = 0; r < p.queries; r++) say(r);
    }
  }
};

// ------------------------------------------------------------------------------------------------------------- order

// f(sequence, first head, head after the last) for every `parts`-th group of heads from `part` on: one call per thread
template <class F> static void units(const Problem &p, F f) {
  Lease lease;
  long groups = (p.heads + GROUP - 1) / GROUP;
  for (long u = p.part; u < p.sequences * groups; u += p.parts) {
    long h = u % groups * GROUP;
    f(u / groups, h, h + GROUP < p.heads ? h + GROUP : p.heads, Room{lease.at});
  }
}
static INL float *state(const Problem &p, float *S, long n, long h) { return S ? S + (n * p.heads + h) * p.keys * p.values : nullptr; }

template <int DECAY, int ERASE> struct Run {
  using Kernel = Cell<DECAY, ERASE>;
  static constexpr long C = Kernel::C;

  static long tokens_of(const Problem &p, long n, long c) { long rest = p.length[n] - c * C; return rest < C ? rest : C; }
  static float *kept(const Problem &p, long n, long s, long h) { return p.kept + ((p.segment[n] + s) * p.heads + h) * KP * VP; }
  static float *written(const Problem &p, long n, long c, long h) { return p.xs + ((p.chunk[n] + c) * p.heads + h) * C * VP; }

  static void forward(const Problem &p) {
    units(p, [&](long n, long from, long to, Room room) {
      BUF(S, GROUP * KP * VP); BUF(own, C * VP);
      long chunks = (p.length[n] + C - 1) / C;
      for (long h = from; h < to; h++) padded(S + (h - from) * KP * VP, state(p, p.S, n, h), p.keys, p.values);
      for (long s = 0; s * p.every < chunks; s++) for (long h = from; h < to; h++) {
        float *at = S + (h - from) * KP * VP;
        if (p.kept) memcpy(kept(p, n, s, h), at, KP * VP * 4);
        for (long c = s * p.every; c < chunks && c < (s + 1) * p.every; c++)
          Kernel::forward(p, n, c * C, h, tokens_of(p, n, c), at, p.xs ? written(p, n, c, h) : own, room);
      }
      for (long h = from; h < to; h++) cropped(state(p, p.end, n, h), S + (h - from) * KP * VP, p.keys, p.values);
    });
  }
  static void backward(const Problem &p) {
    units(p, [&](long n, long from, long to, Room room) {
      BUF(G, GROUP * KP * VP); BUF(S, 16 * KP * VP); BUF(sums, GROUP * KP);  // S: the states within a segment, made again
      auto &b = room.one<typename Kernel::Written>();
      long chunks = (p.length[n] + C - 1) / C;
      for (long h = from; h < to; h++) padded(G + (h - from) * KP * VP, state(p, p.dend, n, h), p.keys, p.values);
      bool begun[GROUP] = {};
      for (long s = (chunks + p.every - 1) / p.every - 1; s >= 0; s--) for (long h = from; h < to; h++) {
        long first = s * p.every, last = first + p.every < chunks ? first + p.every : chunks;
        float *own = G + (h - from) * KP * VP, *sum = sums + (h - from) * KP;
        memcpy(S, kept(p, n, s, h), KP * VP * 4);
        bool end = !begun[h - from];
        for (long c = first; c + !end < last; c++) {
          b.read(p, n, c * C, h, tokens_of(p, n, c));
          Kernel::advance(b, S + (c - first) * KP * VP, written(p, n, c, h), S + (c - first + 1) * KP * VP);
        }
        if (end) {  // <S, G> at the sequence's end
          const float *x = S + (last - first) * KP * VP;
          begun[h - from] = true;
          for (int i = 0; i < KP; i++) {
            vf y = {};
            for (int d = 0; d < VP; d += W) y += ld(x + i * VP + d) * ld(own + i * VP + d);
            sum[i] = total(y);
          }
          if (DECAY == 1) for (int i = 1; i < KP; i++) sum[0] += sum[i];
        }
        for (long c = last - 1; c >= first; c--)
          Kernel::backward(p, n, c * C, h, tokens_of(p, n, c), S + (c - first) * KP * VP, written(p, n, c, h), own, sum, room);
      }
      for (long h = from; h < to; h++) if (p.dS) cropped(state(p, p.dS, n, h), G + (h - from) * KP * VP, p.keys, p.values);
    });
  }
  static void recurrent(const Problem &p) {
    units(p, [&](long n, long from, long to, Room room) {
      BUF(S, KP * VP);
      for (long h = from; h < to; h++) {
        if (p.keys == KP && p.values == VP) {  // in place in the final state
          float *own = state(p, p.end, n, h), *given = state(p, p.S, n, h);
          if (!given) memset(own, 0, KP * VP * 4); else if (given != own) memcpy(own, given, KP * VP * 4);
          Kernel::tokens(p, n, h, own, room);
          continue;
        }
        padded(S, state(p, p.S, n, h), p.keys, p.values);
        Kernel::tokens(p, n, h, S, room);
        cropped(state(p, p.end, n, h), S, p.keys, p.values);
      }
    });
  }
};

using This = Run<DECAY_OF, ERASE_OF>;

}  // namespace

// what: 0 forward in chunks, 1 backward, 2 forward token by token
extern "C" void fwp_run(long what, const Problem *p) {
  FlushDenormals flush;
  if (what == 0) This::forward(*p);
  else if (what == 1) This::backward(*p);
  else This::recurrent(*p);
}
extern "C" long fwp_chunk() { return This::C; }
extern "C" long fwp_size() { return sizeof(Problem); }  // for Python to compare
