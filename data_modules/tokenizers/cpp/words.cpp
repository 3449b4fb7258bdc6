// Splits UTF-8 text into the words of pre_tokenizer.py's pattern, and numbers every distinct one.

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace {

// White space, digits, letters and signs; all of UTF-8's bytes above ASCII are parts of letters.
enum Kind : uint8_t { kSpace, kDigit, kLetter, kSign };

struct Kinds {
  uint8_t of[256];
  Kinds() {
    for (int c = 0; c < 256; ++c) {
      const bool letter = (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_' || c >= 0x80;
      const bool space = c == ' ' || (c >= '\t' && c <= '\r');
      of[c] = letter ? kLetter : c >= '0' && c <= '9' ? kDigit : space ? kSpace : kSign;
    }
  }
};

const Kinds kKinds;
constexpr int64_t kLongest = 64;  // characters of a run

// Where the run of one kind that begins at i ends, kLongest characters on at most.
int64_t end_of_run(const uint8_t* text, int64_t i, int64_t size) {
  const uint8_t kind = kKinds.of[text[i]];
  for (int64_t characters = 0; i < size && kKinds.of[text[i]] == kind; ++i) {
    const bool begins = (text[i] & 0xC0) != 0x80;  // the first byte of a character
    if (begins && ++characters > kLongest) break;
  }
  return i;
}

int64_t end_of_word(const uint8_t* text, int64_t i, int64_t size) {
  if (kKinds.of[text[i]] != kSpace) return end_of_run(text, i, size);
  const bool leads = text[i] == ' ' && i + 1 < size && kKinds.of[text[i + 1]] != kSpace;
  if (leads) return end_of_run(text, i + 1, size);
  const int64_t end = end_of_run(text, i, size);
  // The last of white space before a word is left to it, but for a single one.
  const bool before_word = end < size && kKinds.of[text[end]] != kSpace;
  return before_word && end - i > 1 ? end - 1 : end;
}

uint64_t hash(const uint8_t* word, int64_t size) {
  uint64_t h = 0x9E3779B97F4A7C15ull ^ static_cast<uint64_t>(size);
  while (size > 0) {
    uint64_t part = 0;
    const int64_t taken = size < 8 ? size : 8;
    std::memcpy(&part, word, static_cast<size_t>(taken));
    h = (h ^ part) * 0xFF51AFD7ED558CCDull;
    h ^= h >> 32;
    word += taken;
    size -= taken;
  }
  return h;
}

class Words {
 public:
  Words() : slots_(1024), starts_(1, 0) {}

  // The word's number, and whether it is its first use.
  int64_t number(const uint8_t* word, int64_t size, bool* is_new) {
    const uint64_t h = hash(word, size);
    const uint32_t tag = static_cast<uint32_t>(h >> 32);
    for (uint64_t at = h & mask();; at = (at + 1) & mask()) {
      Slot& slot = slots_[at];
      if (slot.number < 0) {
        slot = {tag, static_cast<int32_t>(count())};
        bytes_.append(reinterpret_cast<const char*>(word), static_cast<size_t>(size));
        starts_.push_back(static_cast<int64_t>(bytes_.size()));
        *is_new = true;
        const int64_t given = slot.number;
        if (2 * count() > static_cast<int64_t>(slots_.size())) grow();
        return given;
      }
      if (slot.tag == tag && equal(slot.number, word, size)) {
        *is_new = false;
        return slot.number;
      }
    }
  }

  int64_t count() const { return static_cast<int64_t>(starts_.size()) - 1; }

 private:
  struct Slot {
    uint32_t tag = 0;
    int32_t number = -1;
  };

  uint64_t mask() const { return slots_.size() - 1; }

  bool equal(int64_t number, const uint8_t* word, int64_t size) const {
    const int64_t start = starts_[number];
    return starts_[number + 1] - start == size &&
           std::memcmp(bytes_.data() + start, word, static_cast<size_t>(size)) == 0;
  }

  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.number < 0) continue;
      const int64_t start = starts_[slot.number];
      const auto* word = reinterpret_cast<const uint8_t*>(bytes_.data()) + start;
      uint64_t at = hash(word, starts_[slot.number + 1] - start) & mask();
      while (slots_[at].number >= 0) at = (at + 1) & mask();
      slots_[at] = slot;
    }
  }

  std::vector<Slot> slots_;  // a power of two, at most half full
  std::string bytes_;        // of all words, one after the other
  std::vector<int64_t> starts_;
};

}  // namespace

extern "C" {

// The digest of the sources, which setup.py gives.
const char* built_from() { return BUILT_FROM; }

void* words_new() { return new Words; }

void words_free(void* words) { delete static_cast<Words*>(words); }

int64_t words_count(void* words) { return static_cast<Words*>(words)->count(); }

// Writes the numbers of a text's words, and where the new ones among them begin and end in it.
// There is room for `size` of either. Returns how many words there are.
int64_t words_split(void* words, const uint8_t* text, int64_t size, int32_t* numbers,
                    int64_t* begins, int64_t* ends) {
  auto& known = *static_cast<Words*>(words);
  int64_t n_words = 0, n_new = 0;
  for (int64_t i = 0; i < size;) {
    const int64_t end = end_of_word(text, i, size);
    bool is_new;
    numbers[n_words++] = static_cast<int32_t>(known.number(text + i, end - i, &is_new));
    if (is_new) {
      begins[n_new] = i;
      ends[n_new++] = end;
    }
    i = end;
  }
  return n_words;
}
}
