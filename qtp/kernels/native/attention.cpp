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

constexpr size_t kWorthAThread = 128 * 1024;  // bytes of keys and values; less, and one thread is done before another is there
constexpr size_t kTogether = 192 * 1024;      // bytes of keys and values of a partition that are read together
constexpr size_t kItems = 4;                 // a thread: so many pieces of work at least, if there is enough

struct Plan {
  std::vector<Unit> units;
  std::vector<Item> items;
  std::vector<Unit*> split;
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
  const size_t item = call.scales != nullptr ? 1 : kItemBytes[int(a.dtype)], bytes = 2 * a.kv_heads * a.width * item;  // of a token
  for (size_t s = 0; s < step.sequences; ++s)
    work += (1 + size_t(step.query_lens[s]) * a.heads / (a.kv_heads * 2 * kTile)) * size_t(step.kv_lens[s]) * bytes;
  const size_t worth = work / kWorthAThread + 1, all = size_t(threads());
  plan.threads = int(worth < all ? worth : all);
  const size_t enough = plan.threads > 1 ? kItems * size_t(plan.threads) : 1;

  for (size_t k = 0; k < a.kv_heads; ++k)
    for (size_t s = 0; s < step.sequences; ++s)
      pieces += (size_t(step.query_lens[s]) * size_t(a.starts[k + 1] - a.starts[k]) - 1) / (kMostTiles * kTile) + 1;
  size_t height = kMostTiles * kTile;
  for (; pieces < enough && height > kTile; pieces *= 2) height /= 2;

  size_t token = 0, total = 0, partitions = 0;
  const int64_t* table = step.tables;
  for (size_t s = 0; s < step.sequences; ++s) {
    const size_t count = size_t(step.query_lens[s]), length = size_t(step.kv_lens[s]), position = length - count;
    for (size_t k = 0; k < a.kv_heads; ++k) {
      const size_t head = size_t(a.starts[k]), group = size_t(a.starts[k + 1]) - head;
      for (size_t first = 0; first < count * group; first += height) {
        const size_t rows = count * group - first < height ? count * group - first : height;
        const size_t from = position + first / group, to = position + (first + rows - 1) / group + 1;
        const size_t begin = from >= call.window ? (from - call.window + 1) / kPartition : 0;
        const size_t end = (to + kPartition - 1) / kPartition;
        plan.units.push_back({table, token, position, head, group, k, first, rows, begin, end, nullptr});
        total += cost(plan.units.back());
        partitions += end - begin;
      }
    }
    token += count;
    table += (length + a.block - 1) / a.block;
  }
  // Where few tokens are added to a sequence, several heads of a partition are read together.
  const size_t most = kTogether * a.kv_heads / (kPartition * bytes) + 1, fair = partitions / (2 * size_t(plan.threads)) + 1;
  const size_t together = fair < most ? fair : most;
  const auto beside = [](const Unit& unit, const Unit& other) {
    return unit.token == other.token && unit.kv_head != other.kv_head && unit.begin == other.begin && unit.end == other.end &&
           unit.rows <= kTile && other.rows <= kTile;
  };
  for (size_t u = plan.units.size(); u > 0;) {  // from the end: a prompt's last rows see the most
    Unit* unit = &plan.units[--u];
    size_t count = 1;
    for (; count < together && u > 0 && beside(*unit, unit[-1]); --u) --unit, ++count;
    const size_t length = unit->end - unit->begin;
    if (length == 1 || (unit->rows > kTile && (plan.threads == 1 || cost(*unit) * enough <= total))) {
      plan.items.push_back({unit, count, unit->begin});
      continue;
    }
    for (size_t partition = unit->begin; partition < unit->end; ++partition) plan.items.push_back({unit, count, partition});
    for (size_t i = 0; i < count; ++i) {
      plan.split.push_back(unit + i);
      plan.parts += length * unit[i].rows * (padded + 2);
    }
  }
}

}  // namespace

void run_attention(const Call& call) {
  const DType dtype = call.attention.dtype;
  const AttentionTable& table = call.scales != nullptr ? attention_over_int8(dtype) : QTP_CHOOSE(kAttention)[int(dtype)];
  const size_t padded = table.padded(call.attention), room = table.room(call.attention);
  thread_local Plan made;
  Plan& plan = made;
  cut(call, padded, plan);
  const size_t shared = (plan.parts * sizeof(float) + 63) / 64 * 64;
  char* memory = static_cast<char*>(scratch(shared + room));
  float* parts = reinterpret_cast<float*>(memory);
  size_t rows = 0;
  for (Unit* unit : plan.split) {
    unit->parts = parts;
    parts += (unit->end - unit->begin) * unit->rows * (padded + 2);
    rows += unit->rows;
  }
  size_t taken = 0;
  parallel(plan.threads, [&](int thread, int count) {
    const size_t vectors = call.step.tokens * (call.attention.heads + 2 * call.attention.kv_heads);
    table.rope(call, share(vectors, thread, count));
    if (count > 1) meet();
    void* own = thread == 0 ? memory + shared : scratch(room);
    const size_t items = plan.items.size();
    const auto take = [&] { return __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED); };
    for (size_t i = take(), next; i < items; i = next) {
      next = take();
      table.attend(call, plan.items[i], next < items ? &plan.items[next] : nullptr, own);
    }
    if (plan.split.empty()) return;
    if (count > 1) meet();
    const Range range = share(rows, thread, count);
    size_t at = 0;
    for (const Unit* split : plan.split) {
      const Unit& unit = *split;
      const size_t begin = range.begin > at ? range.begin - at : 0, end = range.end > at ? range.end - at : 0;
      if (begin < unit.rows && end > begin) table.join(call, unit, {begin, end < unit.rows ? end : unit.rows}, own);
      at += unit.rows;
    }
  });
}

}  // namespace qtp
