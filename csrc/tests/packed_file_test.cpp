// A reader that damage can't hurt: every header that is cut or altered, with its checksum made right again,
// is refused or read within the file. Run under the sanitizers, this shows that no length or offset is
// believed.
#include "packed_file.h"

#include <unistd.h>

#include <fstream>
#include <string>

#include "packed_model.h"

namespace {

// Two numbers and three tensors.
constexpr size_t kHeaderBytes = 64 + 2 * 64 + 3 * 128;

// A matrix of 3 x 5 in rows and the same in columns.
Bytes valid_file() {
  FileWriter file;
  file.number("layers", 7.0);
  file.number("epsilon", 0.5);
  file.add("a", Dtype::f32, Layout::rows, 3, 5, 64, Bytes(192));
  file.add("b", Dtype::f32, Layout::columns, 3, 5, 64, Bytes(320));
  return file.bytes();
}

const std::string kPath = "packed_file_test." + std::to_string(getpid()) + ".relufy";

void write(const Bytes& bytes) {
  std::remove(kPath.c_str());  // faster than to cut it
  std::ofstream(kPath, std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

// Reads every float that a tensor claims to have, so that a sanitizer sees any that is not there.
float touch(const Tensor& t) {
  float sum = 0;
  for (size_t i = 0; i < t.bytes / sizeof(float); ++i) sum += t.vector()[i];
  return sum;
}

void read_all() {
  PackedFile file(kPath);
  if (file.has_tensor("a")) touch(file.matrix("a", 3, 5));
  if (file.has_tensor("b")) touch(file.matrix("b", 3, 5));
  file.whole("layers", 0, 1000);
  file.number("epsilon");
}

void test_reads_a_valid_file() {
  write(valid_file());
  PackedFile file(kPath);
  CHECK(file.whole("layers", 1, 10) == 7);
  CHECK(file.number("epsilon") == 0.5);
  CHECK(throws<FileError>([&] { file.whole("epsilon", 0, 10); }));
  CHECK(throws<FileError>([&] { file.whole("layers", 8, 10); }));
  CHECK(throws<FileError>([&] { file.number("missing"); }));
  CHECK(file.matrix("a", 3, 5).layout == Layout::rows);
  CHECK(file.matrix("b", 3, 5).layout == Layout::columns);
  CHECK(throws<FileError>([&] { file.matrix("a", 5, 3); }));
  CHECK(throws<FileError>([&] { Decoder decoder(file); }));
}

void test_refuses_every_truncation() {
  Bytes bytes = valid_file();
  for (size_t size = 0; size < bytes.size(); size += 7) {
    write(Bytes(bytes.begin(), bytes.begin() + size));
    CHECK(throws<FileError>(read_all));
    Bytes shorter(bytes.begin(), bytes.begin() + size);
    if (size < kHeaderBytes) continue;
    put<uint64_t>(shorter, 24, size);  // a file that lies about its size
    put_checksum(shorter, kHeaderBytes);
    write(shorter);
    CHECK(throws<FileError>(read_all));
  }
}

void test_refuses_a_wrong_checksum() {
  for (size_t at = 0; at < kHeaderBytes; at += 3) {
    Bytes bytes = valid_file();
    bytes[at] ^= 0x10;
    write(bytes);
    CHECK(throws<FileError>(read_all));
  }
}

void test_survives_any_header() {
  std::mt19937 generator(0);
  size_t refused = 0;
  for (int round = 0; round < 3000; ++round) {
    Bytes bytes = valid_file();
    for (int changes = 1 + generator() % 3; changes > 0; --changes) {
      size_t at = 16 + generator() % (kHeaderBytes - 16);
      bytes[at] = generator() % 2 ? static_cast<unsigned char>(generator()) : 0xFF;
    }
    put_checksum(bytes, kHeaderBytes);
    write(bytes);
    refused += throws<FileError>(read_all);
  }
  CHECK(refused > 300);
}

}  // namespace

int main() {
  CHECK(crc32(reinterpret_cast<const unsigned char*>("123456789"), 9) == 0xCBF43926u);
  CHECK(throws<FileError>([] { PackedFile("no such file"); }));
  test_reads_a_valid_file();
  test_refuses_every_truncation();
  test_refuses_a_wrong_checksum();
  test_survives_any_header();
  std::remove(kPath.c_str());
}
