// Whole models from damaged files: a file is refused, or it is run and gives some text. 10,000 files are
// damaged in header and tables (with the checksum made right again) or in their payload; others are cut at
// every border, or claim absurd sizes. Run under the sanitizers.
#include <fcntl.h>
#include <unistd.h>

#include <filesystem>

#include "engine.h"
#include "packed_model.h"
#include "predicted.h"

namespace {

constexpr size_t kRounds = 10000;

const std::string kPath = "damage_test." + std::to_string(getpid()) + ".relufy";

// A valid file, and what is done to it before it is opened.
class Victim {
 public:
  explicit Victim(const TinyModel& model) : original_(packed(model)), bytes_(original_), end_(size()) {
    descriptor_ = open(kPath.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    save();
  }
  ~Victim() { close(descriptor_); }
  Victim(const Victim&) = delete;
  Victim& operator=(const Victim&) = delete;

  size_t size() const { return original_.size(); }
  size_t num_numbers() const { return field<uint32_t>(32); }
  size_t num_tensors() const { return field<uint32_t>(36); }
  size_t header_bytes() const { return field<uint64_t>(16); }
  size_t number_at(size_t i) const { return 64 + 64 * i; }
  size_t tensor_at(size_t i) const { return number_at(num_numbers()) + 128 * i; }

  template <class T>
  T field(size_t at) const {
    T value;
    std::memcpy(&value, &original_[at], sizeof value);
    return value;
  }

  template <class T>
  void set(size_t at, T value) {
    put(bytes_, at, value);
    touch(at, at + sizeof value);
  }

  void copy(size_t from, size_t to, size_t count) {
    std::copy_n(&original_[from], count, &bytes_[to]);
    touch(to, to + count);
  }

  void cut(size_t size) {
    bytes_.resize(size);
    touch(size, original_.size());
  }

  void make_checksum_right() {
    put_checksum(bytes_, header_bytes());
    touch(0, 64);
  }

  // Whether the file as it is now was refused; it is whole again afterwards.
  bool is_refused(Options options = {.context = 64}) {
    save();
    bool refused = throws<FileError>([&] { use(options); });
    bytes_ = original_;
    save();
    begin_ = size(), end_ = 0;
    return refused;
  }

 private:
  void touch(size_t begin, size_t end) {
    begin_ = std::min(begin_, begin);
    end_ = std::max(end_, end);
  }

  // Writes what may differ from what the file holds.
  void save() {
    size_t end = std::min(end_, bytes_.size());
    CHECK(ftruncate(descriptor_, static_cast<off_t>(bytes_.size())) == 0);
    for (size_t at = begin_; at < end;) {
      ssize_t written = pwrite(descriptor_, &bytes_[at], end - at, static_cast<off_t>(at));
      CHECK(written > 0);
      at += static_cast<size_t>(written);
    }
  }

  static void use(Options options) {
    Engine engine(kPath, options);
    size_t vocab = engine.decoder().vocab_size;
    std::vector<int32_t> tokens;
    for (size_t i = 0; i < 3; ++i) tokens.push_back(static_cast<int32_t>(i * 7 % vocab));
    std::vector<float> logits(tokens.size() * vocab);
    bool predicts = engine.refuses_prediction().empty();
    SequenceId id = engine.new_sequence(2, predicts ? std::make_unique<Predicted>(1) : nullptr);
    Work work{id, tokens};
    try {
      engine.step({&work, 1}, Logits::all, logits.data());
      engine.decode(id, std::span(tokens).first(1), 2, {}, {.temperature = 1.0, .top_p = 0.5}, 3);
    } catch (const OutOfKv&) {                // a context may have become tiny
    } catch (const std::invalid_argument&) {  // and logits no numbers
    }
  }

  Bytes original_, bytes_;
  size_t begin_ = 0, end_;  // of what was touched
  int descriptor_;
};

using Random = std::mt19937;

template <class T, size_t N>
T one_of(const T (&values)[N], Random& random) {
  return values[random() % N];
}

void damage_number(Victim& victim, Random& random) {
  constexpr double kValues[] = {0,   -0.0, 1,    2,     3,      6,        16,    17,       64,  -1,
                                0.5, 1e9,  1e19, 1e300, -1e300, 1u << 31, 65536, 1u << 19, NAN, INFINITY};
  size_t at = victim.number_at(random() % victim.num_numbers()) + 56;
  double old = victim.field<double>(at);
  double value = one_of(kValues, random);
  victim.set(at, random() % 3 ? value : old + (random() % 2 ? 1 : -1));
}

void damage_tensor(Victim& victim, Random& random) {
  constexpr uint64_t kValues[] = {
      0, 1, 2, 64, 128, 1u << 19, 1u << 31, uint64_t{1} << 32, uint64_t{1} << 63, UINT64_MAX};
  size_t at = victim.tensor_at(random() % victim.num_tensors());
  size_t other = victim.tensor_at(random() % victim.num_tensors());
  size_t field = 72 + 8 * (random() % 5);
  switch (random() % 5) {
    case 0:
      return victim.set(at + 64, random() % 7);  // type and layout are 32 bits each
    case 1:
      return victim.set(at + 68, static_cast<uint32_t>(random() % 6));
    case 2:
      return victim.set(at + field, one_of(kValues, random));
    case 3:
      return victim.copy(other, at, 64);  // the name
    default:
      return victim.copy(other + 64, at + 64, 48);  // all but the name
  }
}

void damage_tables(Victim& victim, Random& random) {
  for (size_t changes = 1 + random() % 3; changes > 0; --changes) switch (random() % 3) {
      case 0:
        damage_number(victim, random);
        break;
      case 1:
        damage_tensor(victim, random);
        break;
      default:
        victim.set(16 + random() % (victim.header_bytes() - 16), static_cast<uint8_t>(random()));
    }
  victim.make_checksum_right();
}

// A run of one number that is none, or is huge, or of any bytes, in one tensor.
void damage_payload(Victim& victim, Random& random) {
  constexpr uint32_t kPatterns[] = {0x7FC00000u, 0xFFFFFFFFu, 0x7F800000u, 0xFF800000u,
                                    0x7F7FFFFFu, 0xFF7FFFFFu, 0x00000001u, 0x80000000u,
                                    0x7F807F80u, 0x80808080u, 0x7FC17FC1u, 0u};
  for (size_t changes = 1 + random() % 4; changes > 0; --changes) {
    size_t record = victim.tensor_at(random() % victim.num_tensors());
    size_t begin = victim.field<uint64_t>(record + 96), bytes = victim.field<uint64_t>(record + 104);
    size_t first = random() % (bytes / 4), count = random() % 2 ? 1 + random() % 4 : bytes;
    uint32_t pattern = one_of(kPatterns, random);
    bool is_noise = random() % 3 == 0;
    for (size_t i = first; i < std::min(first + count, bytes / 4); ++i)
      victim.set(begin + 4 * i, is_noise ? static_cast<uint32_t>(random()) : pattern);
  }
}

void test_survives_damage(const TinyModel& model, size_t rounds, Random& random) {
  Victim victim(model);
  CHECK(!victim.is_refused());
  size_t refused = 0;
  for (size_t round = 0; round < rounds; ++round) {
    bool in_payload = round % 3 == 0;
    in_payload ? damage_payload(victim, random) : damage_tables(victim, random);
    bool was_refused = victim.is_refused(
        {.context = 64, .skip = round % 2 == 0, .memory = round % 5 ? Memory::map : Memory::load});
    CHECK(!(in_payload && was_refused));
    refused += was_refused;
  }
  CHECK(refused > rounds / 4);
}

void test_refuses_a_cut_at_every_border(const TinyModel& model) {
  Victim victim(model);
  std::vector<size_t> borders{0, 1, 63, 64, victim.size() - 1};
  for (size_t i = 0; i <= victim.num_numbers(); ++i) borders.push_back(victim.number_at(i));
  for (size_t i = 0; i < victim.num_tensors(); ++i) {
    size_t at = victim.tensor_at(i), begin = victim.field<uint64_t>(at + 96);
    borders.insert(borders.end(), {at, begin, begin + 1, begin + victim.field<uint64_t>(at + 104) - 1});
  }
  for (size_t border : borders) {
    victim.cut(border);
    CHECK(victim.is_refused());
    if (border < victim.header_bytes()) continue;
    victim.set(24, border);  // a file that lies about its size
    victim.cut(border);
    victim.make_checksum_right();
    CHECK(victim.is_refused());
  }
}

void test_refuses_absurd_sizes(const TinyModel& model) {
  Victim victim(model);
  constexpr uint64_t kSizes[] = {1u << 29,          1u << 31,          uint64_t{1} << 32,
                                 uint64_t{1} << 62, uint64_t{1} << 63, UINT64_MAX - 63};
  for (size_t i = 0; i < victim.num_tensors(); ++i)
    for (size_t field = 72; field < 112; field += 8)
      for (uint64_t size : kSizes) {
        if (i + 1 == victim.num_tensors() && field < 96) continue;  // of bytes for others, these are not read
        victim.set(victim.tensor_at(i) + field, size);
        victim.make_checksum_right();
        CHECK(victim.is_refused());
      }
  // 2^29 rows of 2^29 weights, in as many bytes as 64 bits can hold of them, or none.
  for (uint32_t layout = 1; layout <= 4; ++layout)
    for (uint64_t dimension : {1u << 29, 1u << 30, 1u << 31}) {
      size_t at = victim.tensor_at(0);
      uint64_t stride = dimension * 4 * (layout == 4 ? 2 : 1);
      victim.set(at + 68, layout);
      victim.set(at + 72, dimension);
      victim.set(at + 80, dimension);
      victim.set(at + 88, stride);
      victim.set(at + 104, stride * dimension);
      victim.make_checksum_right();
      CHECK(victim.is_refused());
    }
  for (size_t at : {16, 24})
    for (uint64_t size : kSizes) {
      victim.set(at, size);
      victim.make_checksum_right();
      CHECK(victim.is_refused());
    }
  for (size_t at : {32, 36}) {
    victim.set(at, UINT32_MAX);
    victim.make_checksum_right();
    CHECK(victim.is_refused());
  }
}

void test_refuses_too_many_partitions() {
  CHECK(!Victim({.name = "sixteen", .neurons = 256}).is_refused());
  CHECK(Victim({.name = "seventeen", .neurons = 257}).is_refused());
}

// A context that no memory holds is no harm until it is used.
void test_context_beyond_memory() {
  Victim victim({.name = "long", .context = size_t{1} << 31});
  CHECK(!victim.is_refused({}));
  Victim longer({.name = "too long", .context = (size_t{1} << 31) + 1});
  CHECK(longer.is_refused({}));
}

}  // namespace

int main() {
  Random random(1);
  std::vector<const char*> sets;
  for (const char* isa : {"portable", "avx2", "avx512", "neon"})
    if (find_kernels(isa)) sets.push_back(isa);
  size_t models = 4 * tiny_models(Dtype::f32).size(), count = 0;
  for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::int8, Dtype::int4})
    for (const TinyModel& model : tiny_models(dtype)) {
      setenv("RELUFY_ISA", sets[count++ % sets.size()], 1);
      test_survives_damage(model, kRounds / models, random);
      if (dtype == Dtype::int4) test_refuses_a_cut_at_every_border(model);
    }
  test_refuses_absurd_sizes(tiny_models(Dtype::int8).front());
  test_refuses_too_many_partitions();
  test_context_beyond_memory();
  std::filesystem::remove(kPath);
}
