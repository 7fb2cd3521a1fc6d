// An expert's probabilities as probabilities of base tokens, through a sparse table M (see reference/bridge_project.py):
//
//   P = sum_s w_s softmax(z_s / tau) + listed probabilities
//   q = P^T M    mass = sum_t P(t) row_sum(t)    u = sum_t P(t) spread(t)
//
// and last, where a floor is given, q := (1 - sum_b floor(b)) q + floor.
//
// A thread takes kLanes rows at a time and keeps their exponentials by expert token, e[t][row]: one entry (t, weight) of a
// base token is then one load and one product for all of the rows. Below kLanes / 4 rows they are taken one by one, e[t].
// Of several states of a row, the one with the most weight is read so; those of the others are added one by one.
#include "cpu/gemm.h"
#include "cpu/logit_rows.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

constexpr int64_t kChunk = 256;      // tokens whose exponentials wait in L1 to be transposed
constexpr int64_t kAhead = 32;       // entries between a prefetch and its use
constexpr float kNoWeight = 1e-30f;  // a state with a share below this counts as none

// log(x), and -inf below the smallest normal number.
inline vf log_or_nothing(vf x) {
  vf value = log_positive(x);
  return x < splat(FLT_MIN) ? splat(-kInf) : value;
}

template <class T>
float row_max(const T* z, int64_t n) {
  vf best = splat(-kInf);
  int64_t t = 0;
  for (; t + kLanes <= n; t += kLanes) best = vmax(load(z + t), best);
  float top = max(best);
  for (; t < n; ++t) top = std::max(top, to_float(z[t]));
  if (top == -kInf && std::any_of(z, z + n, [](T x) { return to_float(x) != to_float(x); })) return NAN;
  return top;
}

struct Sums { double total = 0, mass = 0, spread = 0; };

template <int R>  // rows at a time: 1 or kLanes
class Rows {
 public:
  Rows(const BridgeProject& in, const BridgeProjectResult& out)
      : in(in), out(out), padded(ceil_div(in.width, kChunk) * kChunk), e(std::max(padded, in.n_rows) * R) {
    double floor = 0;
    for (int64_t b = 0; in.floor && b < in.n_base; ++b) floor += in.floor[b];
    above = float(1 - floor);
    prefer_large_pages({e.get(), std::max(padded, in.n_rows), R, R, DType::fp32});
    std::fill(e.get() + in.width * R, e.get() + std::max(padded, in.n_rows) * R, 0.0f);
  }

  void run(int64_t row, int64_t n) {
    first = row, count = n;
    read_logits();
    for (int64_t r = 0; r < count; ++r) add_states(r), add_listed(r);
    bool masked = false;
    for (int64_t r = 0; in.previous && r < count; ++r) masked |= in.previous[first + r] >= 0;
    for (int64_t r = 0; r < count; ++r) factor[r] = in.normalize && sums[r].mass > 0 ? float(1 / sums[r].mass) : 1.0f;
    if (masked) gather<false>();
    else in.floor ? gather<true, true>() : gather<true>();
    for (int64_t r = 0; r < count; ++r) {
      if (masked) in.floor ? mask<true>(r) : mask<false>(r);
      out.mass[first + r] = float(sums[r].mass);
      out.uncertainty[first + r] = float(sums[r].spread + std::max(0.0, 1 - sums[r].total));
      for (int64_t i = listed(r); i < listed(r + 1); ++i)
        if (const int64_t t = in.ids[i]; t >= 0) e[t * R + r] = 0;
    }
  }

 private:
  const BridgeProject& in;
  const BridgeProjectResult& out;
  const int64_t padded;
  Buffer e;  // [expert tokens and further rows of M][R], to be multiplied with scale[row]
  float chunk[R * kChunk];
  std::vector<float> further;  // exponentials of a row's further state
  float above;  // the share that a floor leaves to q
  float scale[R], factor[R];
  Sums sums[R];
  int64_t leading[R];  // the state of each row that weighs most, -1: none
  int64_t first, count;

  template <class T>
  const T* line(const T* z, int64_t s) const { return z + (in.index ? in.index[s] : s) * in.logits.stride; }

  double weight(int64_t s) const { return in.log_weight ? std::exp(double(in.log_weight[s])) : 1.0; }

  // Where the states and the listed probabilities of a row begin; those of the next one end them.
  int64_t states(int64_t r) const { return in.index_start ? in.index_start[first + r] : first + r; }
  int64_t listed(int64_t r) const { return in.listed_start ? in.listed_start[first + r] : 0; }

  int64_t heaviest(int64_t r) const {
    int64_t best = -1;
    double most = kNoWeight;
    for (int64_t s = states(r); s < states(r + 1); ++s)
      if (const double w = weight(s); !(w < most)) most = w, best = s;
    return best;
  }

  // log q of q by token, with the floor in it; `value` is q times its factor.
  template <bool floor>
  vf logarithm(vf value, int64_t b, int64_t n) const {
    if constexpr (floor) value = value * above + (n == kLanes ? load(in.floor + b) : load_line(in.floor + b, 1, n));
    return log_or_nothing(value);
  }

  void read_logits() {
    float top[R];
    for (int r = 0; r < R; ++r) {
      sums[r] = {}, scale[r] = 1, factor[r] = 1, top[r] = -kInf;
      leading[r] = r < count ? heaviest(r) : -1;
      if (leading[r] >= 0) with_type(in.logits, [&](auto* z) { top[r] = row_max(line(z, leading[r]), in.width); });
    }
    for (int64_t t = 0; t < in.width; t += kChunk) {
      for (int r = 0; r < R; ++r) {
        float* x = R == 1 ? e.get() + t : chunk + r * kChunk;
        if (top[r] == -kInf) std::fill(x, x + kChunk, 0.0f);
        else with_type(in.logits, [&](auto* z) { read(line(z, leading[r]), t, top[r], x, sums[r]); });
      }
      if (R > 1) by_token(e.get() + t * R, std::min(kChunk, in.n_rows - t));
    }
    for (int r = 0; r < R; ++r) {
      if (top[r] == -kInf) continue;
      const double share = weight(leading[r]), unit = share / sums[r].total;
      scale[r] = float(unit);
      sums[r] = {share, sums[r].mass * unit, sums[r].spread * unit};
    }
  }

  // The states of a row beside the leading one.
  void add_states(int64_t r) {
    for (int64_t s = states(r); in.index_start && s < states(r + 1); ++s)
      if (s != leading[r] && !(weight(s) < kNoWeight)) with_type(in.logits, [&](auto* z) { add_state(line(z, s), r, weight(s)); });
  }

  template <class T>
  void add_state(const T* z, int64_t r, double share) {
    const float top = row_max(z, in.width);
    if (top == -kInf) return;
    further.resize(padded);
    Sums own;
    for (int64_t t = 0; t < in.width; t += kChunk) read(z, t, top, further.data() + t, own);
    const double unit = share / own.total;
    const float factor = float(unit / scale[r]);
    for (int64_t t = 0; t < in.width; ++t) e[t * R + r] += further[t] * factor;
    sums[r].total += share, sums[r].mass += own.mass * unit, sums[r].spread += own.spread * unit;
  }

  // exp((z - top) / tau) of a chunk of tokens, zeros past the width.
  template <class T>
  void read(const T* z, int64_t from, float top, float* x, Sums& to) const {
    const float inverse = 1 / in.temperature;
    const int64_t n = std::min(kChunk, in.width - from);
    vf total = {}, mass = {}, spread = {};
    auto step = [&](int64_t t, vf z, vf row_sum, vf spread_of) {
      vf v = exp_nonpositive((z - top) * inverse);
      store(x + t, v);
      total += v, mass += v * row_sum, spread += v * spread_of;
    };
    int64_t t = 0;
    for (; t + kLanes <= n; t += kLanes) step(t, load(z + from + t), load(in.row_sum + from + t), load(in.spread + from + t));
    if (t < n) {  // as if logits of -inf followed: a padded head gives the same bits
      vf rest = splat(-kInf);
      for (int64_t i = t; i < n; ++i) rest[i - t] = to_float(z[from + i]);
      step(t, rest, load_line(in.row_sum + from + t, 1, n - t), load_line(in.spread + from + t, 1, n - t));
    }
    to.total += sum(total), to.mass += sum(mass), to.spread += sum(spread);
    std::fill(x + n, x + kChunk, 0.0f);
  }

  void by_token(float* to, int64_t n) const {
    for (int64_t t = 0; t < kChunk; t += kLanes) {
      vf tile[kLanes];
      for (int r = 0; r < kLanes; ++r) tile[r] = load(chunk + r % R * kChunk + t);
      transpose(tile);
      for (int64_t j = 0; j < kLanes && t + j < n; ++j) store(to + (t + j) * R, tile[j]);
    }
  }

  void add_listed(int64_t r) {
    for (int64_t i = listed(r); i < listed(r + 1); ++i) {
      const int64_t t = in.ids[i];
      if (t < 0) continue;
      const double p = std::exp(double(in.log_probs[i]));
      e[t * R + r] += float(p / scale[r]);
      sums[r].total += p, sums[r].mass += p * in.row_sum[t], sums[r].spread += p * in.spread[t];
    }
  }

  float* q(int64_t r) const { return out.log_q + (first + r) * in.n_base; }

  // q by base token, its logarithm where asked.
  template <bool logs, bool floor = false>
  void gather() {
    const bool aligned = reinterpret_cast<uintptr_t>(out.log_q) % sizeof(vf) == 0 && in.n_base % kLanes == 0;
    const int64_t last = in.entries - 1;
    const float *from = e.get(), *weights = in.weights;
    const int32_t* rows = in.rows;
    for (int64_t b = 0; b < in.n_base; b += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, in.n_base - b);
      vf tile[kLanes] = {};
      for (int64_t j = 0; j < n; ++j) {
        const int64_t end = in.start[b + j + 1];
        std::conditional_t<R == 1, float, vf> total = {};
        for (int64_t i = in.start[b + j]; i < end; ++i) {
          __builtin_prefetch(from + int64_t(rows[std::min(i + kAhead, last)]) * R);
          const float* p = from + int64_t(rows[i]) * R;
          if constexpr (R == 1) total += *p * weights[i];
          else total += load(p) * weights[i];
        }
        if constexpr (R == 1) tile[0][j] = total;
        else tile[j] = total;
      }
      if (R > 1) transpose(tile);
      for (int64_t r = 0; r < count; ++r) {
        vf v = tile[r] * scale[r];
        if (logs) v = logarithm<floor>(v * factor[r], b, n);
        if (logs && aligned) stream(q(r) + b, v);
        else if (n == kLanes) store(q(r) + b, v);
        else std::memcpy(q(r) + b, &v, n * sizeof(float));
      }
    }
    if (logs && aligned) fence();
  }

  template <bool floor>
  void mask(int64_t r) {
    float* row = q(r);
    if (const int64_t list = in.previous[first + r]; list >= 0) {
      for (int64_t i = in.blocked_start[list]; i < in.blocked_start[list + 1]; ++i) row[in.blocked[i]] = 0;
      double rest = 0;
      for (int64_t b = 0; b < in.n_base; b += kBlock) rest += partial_sum(row + b, std::min(kBlock, in.n_base - b));
      const bool left = rest > FLT_MIN;
      factor[r] = left ? float((in.normalize ? 1 : sums[r].mass) / rest) : 0.0f;
      if (!left) sums[r].mass = 0;
    }
    int64_t b = 0;
    for (; b + kLanes <= in.n_base; b += kLanes) store(row + b, logarithm<floor>(load(row + b) * factor[r], b, kLanes));
    for (; b < in.n_base; ++b) row[b] = logarithm<floor>(splat(row[b] * factor[r]), b, 1)[0];
  }

  static float partial_sum(const float* x, int64_t n) {
    vf total = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) total += load(x + i);
    float rest = sum(total);
    for (; i < n; ++i) rest += x[i];
    return rest;
  }
};

template <int R>
void run(const BridgeProject& in, const BridgeProjectResult& out) {
#pragma omp parallel
  {
    Rows<R> rows(in, out);
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < in.count; row += R) rows.run(row, std::min<int64_t>(R, in.count - row));
  }
}

}  // namespace

void bridge_project(const BridgeProject& in, const BridgeProjectResult& out) {
  prefer_large_pages({out.log_q, in.count, in.n_base, in.n_base, DType::fp32});
  if (in.count < kLanes / 4) run<1>(in, out);
  else run<kLanes>(in, out);
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
