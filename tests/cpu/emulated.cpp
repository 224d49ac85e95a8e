// The kernels of an architecture that is not at hand, run in an emulator: every operator against
// its definition in double. Torch-free; test_emulated.py builds it for AArch64 (NEON).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <type_traits>
#include <vector>

#include "ops.h"

using namespace fastcl::cpu;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

namespace {

const Pool kSerial{1, nullptr};
int failures = 0;

void expect(const char* what, double error, double allowed) {
  const bool passed = error <= allowed;  // a NaN does not
  std::printf("%-28s %.1e%s\n", what, error, passed ? "" : "  FAILED");
  failures += !passed;
}

uint32_t state = 1;
float random_number() {
  state = state * 1664525u + 1013904223u;
  return (float)((double)(state >> 8) / (1 << 23) - 1.0);
}

Floats matrix(i64 n, i64 d) {
  Floats x(n * d);
  for (float& v : x) v = random_number();
  return x;
}

Matrix view(const Floats& x, i64 n, i64 d) { return {x.data(), n, d, d, Storage::f32}; }

template <class A, class B>
double error(const A* result, const B* exact, i64 size) {
  double worst = 0, largest = 1e-30;
  for (i64 i = 0; i < size; ++i) {
    worst = std::fmax(worst, std::isnan((double)result[i])
                                 ? INFINITY : std::fabs((double)result[i] - exact[i]));
    largest = std::fmax(largest, std::fabs((double)exact[i]));
  }
  return worst / largest;
}

Problem problem(const Floats& q, const Floats& k, i64 n, i64 m, i64 d, float scale) {
  Problem p{};
  p.queries = view(q, n, d), p.keys = view(k, m, d);
  p.scale = scale, p.kernels = isa().f32, p.pool = kSerial;
  p.skips = 1;  // offset 0
  return p;
}

double dot(const float* a, const float* b, i64 d) {
  return std::inner_product(a, a + d, b, 0.0, std::plus<>(),
                            [](float x, float y) { return (double)x * y; });
}

double softplus(double x) { return std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x))); }

// Weights W as a definition gives them, and their product with the keys.
void check_gradient(const char* what, const Doubles& w, const Floats& k, const Floats& result,
                    i64 n, i64 m, i64 d, float scale) {
  Doubles exact(n * d);
  for (i64 i = 0; i < n; ++i)
    for (i64 j = 0; j < m; ++j)
      for (i64 f = 0; f < d; ++f) exact[i * d + f] += scale * w[i * m + j] * k[j * d + f];
  expect(what, error(result.data(), exact.data(), n * d), 2e-6);
}

void check_reductions(i64 n, i64 m, i64 d, float scale) {
  const Floats q = matrix(n, d), k = matrix(m, d);
  const Problem p = problem(q, k, n, m, d, scale);
  Doubles rows(n), columns(m), exact_rows(n), exact_columns(m), exact_sums(n), w(n * m), v(n * m);
  for (i64 i = 0; i < n; ++i)
    for (i64 j = 0; j < m; ++j) {
      if (i == j) continue;
      const double s = scale * dot(&q[i * d], &k[j * d], d);
      exact_rows[i] += std::exp(s), exact_columns[j] += std::exp(s), exact_sums[i] += softplus(s);
    }
  for (i64 i = 0; i < n; ++i)
    for (i64 j = 0; j < m; ++j) {
      if (i == j) continue;
      const double s = scale * dot(&q[i * d], &k[j * d], d);
      w[i * m + j] = std::exp(s) / exact_rows[i] + std::exp(s) / exact_columns[j];
      v[i * m + j] = 1 / (1 + std::exp(-s));
    }
  for (double& x : exact_rows) x = std::log(x);
  for (double& x : exact_columns) x = std::log(x);

  float offset;
  LogSumExp out{};
  out.rows = rows.data(), out.columns = columns.data(), out.offset = &offset;
  logsumexp(p, out);
  expect("log-sum-exp, rows", error(rows.data(), exact_rows.data(), n), 1e-6);
  expect("log-sum-exp, columns", error(columns.data(), exact_columns.data(), m), 1e-6);
  const Floats ones(std::max(n, m), 1.0f);
  Floats gradient(n * d);
  LogSumExpGradient g{};
  g.grad_rows = g.grad_columns = ones.data(), g.rows = rows.data(), g.columns = columns.data();
  g.offset = offset, g.queries = gradient.data();
  logsumexp_backward(p, g);
  check_gradient("log-sum-exp, gradient", w, k, gradient, n, m, d, scale);

  Floats sums(n);
  sum(p, Phi::softplus, nullptr, sums.data());
  expect("sum", error(sums.data(), exact_sums.data(), n), 1e-6);
  SumGradient h{};
  h.phi = Phi::softplus, h.grad_rows = ones.data(), h.queries = gradient.data();
  sum_backward(p, h);
  check_gradient("sum, gradient", v, k, gradient, n, m, d, scale);
}

void check_topk(i64 n, i64 m, i64 d, i64 count) {
  Floats q = matrix(n, d), k = matrix(m, d);
  for (Floats* x : {&q, &k})  // small integers: exact, and full of ties
    for (float& v : *x) v = std::round(2 * v);
  std::vector<i64> indices(n * count), order(m);
  Floats values(n * count);
  topk(problem(q, k, n, m, d, 1.0f), count, nullptr, indices.data(), values.data());
  i64 wrong = 0;
  for (i64 i = 0; i < n; ++i) {
    const auto score = [&](i64 j) { return i == j ? -INFINITY : dot(&q[i * d], &k[j * d], d); };
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](i64 a, i64 b) { return score(a) > score(b); });
    for (i64 c = 0; c < count; ++c)
      wrong += indices[i * count + c] != order[c] || values[i * count + c] != score(order[c]);
  }
  expect("top-k", (double)wrong, 0);
}

// Rows divided by their length; numbers in fp16 or bf16 are multiples of 1/8, which both hold.
void check_normalize(Storage storage, const char* what, i64 n, i64 d) {
  Floats x = matrix(n, d);
  std::vector<uint16_t> halves(n * d);
  for (i64 i = 0; i < n * d; ++i) {
    x[i] = std::round(8 * x[i]) / 8;
    uint32_t bits;
    std::memcpy(&bits, &x[i], 4);
    const uint32_t exponent = bits >> 23 & 0xff, sign = bits >> 16 & 0x8000;
    halves[i] = storage == Storage::bf16 ? (uint16_t)(bits >> 16)
                : x[i] == 0              ? (uint16_t)sign
                                         : (uint16_t)(sign | (exponent - 112) << 10 |
                                                      (bits >> 13 & 0x3ff));
  }
  const Matrix m{storage == Storage::f32 ? (const void*)x.data() : halves.data(), n, d, d, storage};
  Floats y(n * d), inverse(n);
  Doubles exact(n * d);
  normalize(isa().f32, kSerial, m, 1e-12f, y.data(), inverse.data());
  for (i64 i = 0; i < n; ++i)
    for (i64 f = 0; f < d; ++f)
      exact[i * d + f] = x[i * d + f] / std::sqrt(dot(&x[i * d], &x[i * d], d));
  expect(what, error(y.data(), exact.data(), n * d), 1e-6);
}

// The scores of unit rows, those of a before those of b.
using Scores = std::function<double(i64, i64)>;
using Definition = std::function<double(const Scores&)>;

Definition softmax_of(PairSoftmax::Form form, i64 n) {
  return [=](const Scores& score) {
    double total = 0;
    for (i64 i = 0; i < (form == PairSoftmax::rows ? n : 2 * n); ++i) {
      double sum = 0;
      for (i64 j = 0; j < 2 * n; ++j)
        if (j % n != i % n && (form == PairSoftmax::views || (i < n) != (j < n)))
          sum += std::exp(score(i, j));
      total += softplus(std::log(sum) - score(i, (i + n) % (2 * n)));
    }
    return total / (form == PairSoftmax::rows ? n : 2 * n);
  };
}

Definition sigmoid_of(double bias, i64 n) {
  return [=](const Scores& score) {
    double total = 0;
    for (i64 i = 0; i < n; ++i)
      for (i64 j = 0; j < n; ++j)
        total += softplus((i == j ? -1.0 : 1.0) * (score(i, n + j) + bias));
    return total / n;
  };
}

double pair_loss(const Definition& definition, Doubles z, i64 n, i64 d, double scale) {
  for (i64 i = 0; i < 2 * n; ++i) {
    double square = 0;
    for (i64 f = 0; f < d; ++f) square += z[i * d + f] * z[i * d + f];
    for (i64 f = 0; f < d; ++f) z[i * d + f] /= std::sqrt(square);
  }
  return definition([&](i64 i, i64 j) {
    return scale * std::inner_product(&z[i * d], &z[i * d] + d, &z[j * d], 0.0);
  });
}

template <class Loss>
void check_pair_loss(const char* what, void (*run)(Loss), std::decay_t<Loss> p,
                     const Definition& definition, i64 n, i64 d, float scale) {
  const Floats z = matrix(2 * n, d);
  Floats gradient(2 * n * d);
  float loss;
  p.a = view(z, n, d), p.b = p.a;
  p.b.data = z.data() + n * d;
  p.mean = true, p.scale = scale, p.eps = 1e-12f;
  p.kernels = isa().f32, p.pool = kSerial;
  p.loss = &loss, p.grad_a = {gradient.data(), Storage::f32};
  p.grad_b = {gradient.data() + n * d, Storage::f32};
  run(p);
  const Doubles exact(z.begin(), z.end());
  const double value = pair_loss(definition, exact, n, d, scale);
  expect(what, std::fabs(loss - value) / value, 1e-6);
  Floats found;
  Doubles slopes;
  for (i64 at = 3; at < 2 * n * d; at += 2 * n * d / 7) {
    Doubles above = exact, below = exact;
    above[at] += 1e-5, below[at] -= 1e-5;
    slopes.push_back((pair_loss(definition, above, n, d, scale) -
                      pair_loss(definition, below, n, d, scale)) / 2e-5);
    found.push_back(gradient[at]);
  }
  expect("  its gradient", error(found.data(), slopes.data(), (i64)found.size()), 1e-5);
}

void check_pair_losses(i64 n, i64 d, float scale) {
  PairSoftmax softmax{};
  softmax.keep = true;
  const char* names[] = {"pair softmax, views", "pair softmax, rows", "pair softmax, both"};
  for (auto form : {PairSoftmax::views, PairSoftmax::rows, PairSoftmax::both}) {
    softmax.form = form;
    check_pair_loss(names[form], pair_softmax, softmax, softmax_of(form, n), n, d, scale);
  }
  PairSigmoid sigmoid{};
  sigmoid.bias = -2.0f;
  check_pair_loss("pair sigmoid", pair_sigmoid, sigmoid, sigmoid_of(sigmoid.bias, n), n, d, scale);
}

}  // namespace

int main() {
  std::printf("%s\n", isa().name.c_str());
  check_reductions(37, 53, 19, 2.0f);   // tails of every tile
  check_reductions(300, 260, 24, 1.5f); // several blocks
  check_topk(30, 500, 3, 20);
  check_normalize(Storage::f32, "normalise fp32", 21, 37);
  check_normalize(Storage::bf16, "normalise bf16", 21, 37);
  check_normalize(Storage::f16, "normalise fp16", 21, 37);
  check_pair_losses(41, 13, 5.0f);
  return failures != 0;
}
