// Paged attention of one rank: rope, the writing of the KV cache and the attention of a whole step in one call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.hpp"
#include "parallel.hpp"

namespace qtp {

// The context is cut at multiples of kPartition positions. Each partition has a maximum and a sum of its own, and they are put
// together in order of position, so that a row's result does not depend on who computes what, or on the other rows.
constexpr size_t kPartition = 256;
constexpr size_t kTile = 16;       // rows that are computed together; a row is one query head of one token
constexpr size_t kMostTiles = 8;   // tiles that share what is prepared of a partition

// width: elements of a head. Query heads starts[k] ... starts[k + 1] - 1 read KV head k. block: slots of a block of the cache.
struct Attention {
  DType dtype;
  size_t heads, kv_heads, width, block;
  const int64_t* starts;
};

// cos, sin: tokens x width / 2. slots: where each token goes. Of each sequence: its tokens in this step and in the cache, and
// as many blocks as the latter need, one sequence after the other.
struct Step {
  size_t tokens, sequences;
  const int64_t *slots, *query_lens, *kv_lens, *tables;
  const float *cos, *sin;
};

// How keys and values of one layer are int8, and with query_scale how queries are rounded: see KVScales in qtp/kv/cache.py. Of keys
// and values kv_heads x width, of queries heads, or null.
struct Scales {
  const float *key_scale, *key_offset, *value_scale, *value_offset, *query_scale, *query_offset;
};

// qkv: a row of (heads + 2 kv_heads) x width elements a token, `stride` apart; queries are turned where they lie. out: tokens x
// heads x width. window: how many positions a token sees, itself included. scales: null unless keys and values are int8.
struct Call {
  const Attention& attention;
  const Step& step;
  void *keys, *values, *qkv, *out;
  size_t stride, window;
  const Scales* scales;
};

// Rows first ... first + rows - 1 of one sequence and KV head: its tokens in order, of each the query heads that read this KV
// head. They see partitions begin ... end - 1.
struct Unit {
  const int64_t* table;
  size_t token;     // of the step: the sequence's first
  size_t position;  // of that token
  size_t head, group, kv_head;
  size_t first, rows;
  size_t begin, end;
  float* parts;     // where each partition's results go, if they are not put together by one thread
};

// Work that one thread does at a time: all of `count` units, or one partition of them where they have `parts`. They are those of
// successive KV heads, so that what lies together in memory is read together.
struct Item {
  const Unit* units;
  size_t count, partition;
};

struct AttentionTable {
  size_t (*room)(const Attention& attention);   // bytes that `attend` and `join` need
  size_t (*padded)(const Attention& attention); // floats of a row of results, a maximum and a sum besides
  void (*rope)(const Call& call, Range heads);  // of tokens x (heads + 2 kv_heads): turned or written to the cache
  // One item; `next`, or null, is what this thread will do then.
  void (*attend)(const Call& call, const Item& item, const Item* next, void* memory);
  void (*join)(const Call& call, const Unit& unit, Range rows, void* memory);          // unit.parts, to the end
};

void run_attention(const Call& call);

const AttentionTable& attention_over_int8(DType dtype);  // of the run

}  // namespace qtp
