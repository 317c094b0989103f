// Finds out what the machine can do.
#include "table.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace paceline {

namespace portable { extern const Table table; }
#if defined(__x86_64__)
namespace avx2 { extern const Table table; }
namespace avx512 { extern const Table table; }
namespace amx { extern const Table table; }
#endif

namespace {

#if defined(__x86_64__)

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  for (const bool has : {bool(__builtin_cpu_supports("avx512f")),
                         bool(__builtin_cpu_supports("avx512bw")),
                         bool(__builtin_cpu_supports("avx512vl")),
                         bool(__builtin_cpu_supports("avx512dq")),
                         bool(__builtin_cpu_supports("avx512vnni")),
                         bool(__builtin_cpu_supports("avx512bf16"))}) {
    if (!has) return false;
  }
  return has_avx2();
}

bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if ((d & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
  // Tile data is off until a process asks (Linux Documentation/arch/x86/xstate.rst).
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#endif

}  // namespace

const Table* find_table(const char* name) {
  const bool any = name == nullptr || *name == '\0';
#if defined(__x86_64__)
  if ((any || !std::strcmp(name, "amx")) && has_amx()) return &amx::table;
  if ((any || !std::strcmp(name, "avx512")) && has_avx512()) return &avx512::table;
  if ((any || !std::strcmp(name, "avx2")) && has_avx2()) return &avx2::table;
#endif
  if (any || !std::strcmp(name, "portable")) return &portable::table;
  return nullptr;
}

}  // namespace paceline
