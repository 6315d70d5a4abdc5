//! Marsaglia's xorshift64: the same numbers for the same seed, everywhere.

use uuid::Uuid;

pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        // splitmix64's last steps: seeds that are neighbours give schedules that are not.
        let mut z = seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        Dice((z ^ (z >> 31)) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn roll(&mut self, sides: u64) -> u64 {
        (self.next() >> 20) % sides
    }

    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::try_from(self.roll(all.len() as u64)).unwrap()]
    }

    /// Mostly nothing.
    pub fn latency(&mut self, longest: u64) -> u64 {
        match self.roll(4) {
            0 => 1 + self.roll(longest),
            _ => 0,
        }
    }

    pub fn uuid(&mut self) -> Uuid {
        super::ids((u128::from(self.next()) << 64) | u128::from(self.next()))
    }
}
