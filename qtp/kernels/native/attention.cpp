#include "attention.hpp"

#include <vector>

#include "linear.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define QTP_BODY "attention.inl"
#include "each_isa.inl"

namespace qtp {
namespace {

constexpr size_t kWorthAThread = 48 * 1024;  // bytes of keys and values, times tiles of rows, that one thread reads meanwhile
constexpr size_t kItems = 4;                 // a thread: so many pieces of work at least, if there is enough

// Work that one thread does: all of a unit, or one partition of it.
struct Item {
  size_t unit;
  size_t partition;
  bool whole;
};

struct Plan {
  std::vector<Unit> units;
  std::vector<Item> items;
  std::vector<size_t> split;  // units
  size_t parts;               // floats
  int threads;
};

size_t tiles(const Unit& unit) { return (unit.rows + kTile - 1) / kTile; }
size_t cost(const Unit& unit) { return (unit.end - unit.begin) * (1 + tiles(unit)); }

void cut(const Call& call, size_t padded, Plan& plan) {
  const Attention& a = call.attention;
  const Step& step = call.step;
  plan.units.clear();
  plan.items.clear();
  plan.split.clear();
  plan.parts = 0;
  size_t work = 0, pieces = 0;
  for (size_t s = 0; s < step.sequences; ++s) work += size_t(step.query_lens[s]) * size_t(step.kv_lens[s]);
  const size_t most = work * a.heads / kTile * a.width * kItemBytes[int(a.dtype)] / kWorthAThread + 1;
  work = 0;
  for (size_t s = 0; s < step.sequences; ++s) work += size_t(step.kv_lens[s]) + size_t(step.query_lens[s]);
  const size_t bytes = 2 * a.kv_heads * a.width * kItemBytes[int(a.dtype)];
  const size_t worth = work * bytes / kWorthAThread + 1, all = size_t(threads());
  const size_t wanted = worth > most ? worth : most;
  plan.threads = int(wanted < all ? wanted : all);
  const size_t enough = plan.threads > 1 ? kItems * size_t(plan.threads) : 1;

  for (size_t k = 0; k < a.kv_heads; ++k)
    for (size_t s = 0; s < step.sequences; ++s)
      pieces += (size_t(step.query_lens[s]) * size_t(a.starts[k + 1] - a.starts[k]) + kMostTiles * kTile - 1) / (kMostTiles * kTile);
  size_t height = kMostTiles * kTile;
  for (; pieces < enough && height > kTile; pieces *= 2) height /= 2;

  size_t token = 0, total = 0;
  const int64_t* table = step.tables;
  for (size_t s = 0; s < step.sequences; ++s) {
    const size_t count = size_t(step.query_lens[s]), length = size_t(step.kv_lens[s]), position = length - count;
    for (size_t k = 0; k < a.kv_heads; ++k) {
      const size_t head = size_t(a.starts[k]), group = size_t(a.starts[k + 1]) - head;
      for (size_t first = 0; first < count * group; first += height) {
        const size_t rows = count * group - first < height ? count * group - first : height;
        const size_t from = position + first / group, to = position + (first + rows - 1) / group + 1;
        const size_t begin = from >= call.window ? (from - call.window + 1) / kPartition : 0;
        plan.units.push_back({table, token, position, length, head, group, k, first, rows, begin, (to + kPartition - 1) / kPartition,
                              nullptr});
        total += cost(plan.units.back());
      }
    }
    token += count;
    table += (length + a.block - 1) / a.block;
  }
  for (size_t u = plan.units.size(); u-- > 0;) {  // from the end: a prompt's last rows see the most
    const Unit& unit = plan.units[u];
    if (plan.threads > 1 && unit.end - unit.begin > 1 && cost(unit) * enough > total) {
      for (size_t partition = unit.begin; partition < unit.end; ++partition) plan.items.push_back({u, partition, false});
      plan.split.push_back(u);
      plan.parts += (unit.end - unit.begin) * unit.rows * (padded + 2);
    } else {
      plan.items.push_back({u, 0, true});
    }
  }
}

}  // namespace

void run_attention(const Call& call) {
  const AttentionTable& table = QTP_CHOOSE(kAttention)[int(call.attention.dtype)];
  const size_t padded = table.padded(call.attention), room = table.room(call.attention);
  thread_local Plan made;
  Plan& plan = made;
  cut(call, padded, plan);
  const size_t shared = (plan.parts * sizeof(float) + 63) / 64 * 64;
  char* memory = static_cast<char*>(scratch(shared + room));
  float* parts = reinterpret_cast<float*>(memory);
  size_t rows = 0;
  for (size_t u : plan.split) {
    Unit& unit = plan.units[u];
    unit.parts = parts;
    parts += (unit.end - unit.begin) * unit.rows * (padded + 2);
    rows += unit.rows;
  }
  size_t next = 0;
  parallel(plan.threads, [&](int thread, int count) {
    const size_t vectors = call.step.tokens * (call.attention.heads + 2 * call.attention.kv_heads);
    table.rope(call, share(vectors, thread, count));
    if (count > 1) meet();
    void* own = thread == 0 ? memory + shared : scratch(room);
    for (size_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < plan.items.size();) {
      const Item& item = plan.items[i];
      const Unit& unit = plan.units[item.unit];
      if (item.whole)
        table.attend(call, unit, own);
      else
        table.part(call, unit, item.partition, own);
    }
    if (plan.split.empty()) return;
    if (count > 1) meet();
    const Range range = share(rows, thread, count);
    size_t at = 0;
    for (size_t u : plan.split) {
      const Unit& unit = plan.units[u];
      const size_t begin = range.begin > at ? range.begin - at : 0, end = range.end > at ? range.end - at : 0;
      if (begin < unit.rows && end > begin) table.join(call, unit, {begin, end < unit.rows ? end : unit.rows}, own);
      at += unit.rows;
    }
  });
}

}  // namespace qtp
