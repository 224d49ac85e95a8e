// Which instruction set serves: the best the processor has, or the one FASTCL_CPU_ISA names.
#include <cstdlib>
#include <stdexcept>

#include "ops.h"

namespace fastcl::cpu {
namespace {

struct Level {
  const char* name;
  const Kernels *f32, *bf16;
  bool supported;
};

bool has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool has_bf16() {
#if defined(__x86_64__)
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// From the lowest up. Below avx512_bf16, bf16 precision is computed in fp32: more precisely.
const Level* levels() {
  static const Level table[] = {
      {"baseline", kernels_baseline(), kernels_baseline(), true},
      {"avx2", kernels_avx2(), kernels_avx2(), has_avx2()},
      {"avx512", kernels_avx512(), kernels_avx512(), has_avx512()},
      {"avx512_bf16", kernels_avx512(), kernels_avx512_bf16(), has_bf16()},
  };
  return table;
}
constexpr int kLevels = 4;

Isa choose(const char* name) {
  const Level* table = levels();
  for (int n = kLevels - 1; n >= 0; --n)
    if (table[n].supported && (!name || name == std::string(table[n].name)))
      return {table[n].name, table[n].f32, table[n].bf16};
  throw std::runtime_error("FASTCL_CPU_ISA is '" + std::string(name) +
                           "'; this processor runs: " + supported_isas());
}

Isa& current() {
  static Isa chosen = [] {
    const char* name = std::getenv("FASTCL_CPU_ISA");
    return choose(name && *name ? name : nullptr);
  }();
  return chosen;
}

}  // namespace

const Isa& isa() { return current(); }

void set_isa(const char* name) { current() = choose(name); }

std::string supported_isas() {
  std::string names;
  for (int n = 0; n < kLevels; ++n)
    if (levels()[n].supported) names += (names.empty() ? "" : ", ") + std::string(levels()[n].name);
  return names;
}

}  // namespace fastcl::cpu
