use aws_nitro_enclaves_image_format::defs::{EifIdentityInfo};
use aws_nitro_enclaves_image_format::utils::{EifBuilder, SignKeyData, EifSigner, PcrSignatureChecker};
use aws_nitro_enclaves_image_format::utils::eif_reader::EifReader;
use sha2::{Digest, Sha384};
use std::fs::OpenOptions;
use std::path::Path;

// build OUT KERNEL CMDLINE METADATA FLAGS KEY|- CERT|- RAMDISK... ; describe FILE ; sign FILE KEY CERT
fn main() {
    let a: Vec<String> = std::env::args().collect();
    match a[1].as_str() {
        "build" => {
            let info: EifIdentityInfo = serde_json::from_slice(&std::fs::read(&a[5]).unwrap()).unwrap();
            let sign = if a[7] == "-" { None } else { Some(SignKeyData::new(&a[7], Path::new(&a[8])).unwrap()) };
            let mut b = EifBuilder::new(Path::new(&a[3]), a[4].clone(), sign, Sha384::new(), a[6].parse().unwrap(), info);
            for r in &a[9..] { b.add_ramdisk(Path::new(r)); }
            let mut f = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&a[2]).unwrap();
            println!("{}", serde_json::to_string(&b.write_to(&mut f)).unwrap());
        }
        "describe" => {
            let mut r = EifReader::from_eif(a[2].clone()).unwrap();
            let m = r.get_measurements().unwrap();
            let signed = r.signature_section.is_some();
            let mut cert = serde_json::Value::Null;
            let mut valid = serde_json::Value::Null;
            if signed {
                cert = match r.get_certificate_info(m.clone()) { Ok(c) => serde_json::to_value(&c).unwrap(), Err(e) => e.into() };
                valid = match PcrSignatureChecker::from_eif(&a[2]).unwrap().verify() { Ok(()) => true.into(), Err(e) => e.into() };
            }
            println!("{}", serde_json::json!({"measurements": m, "crc": r.check_crc(), "crc_value": r.eif_crc, "sign_check": r.sign_check, "certificate": cert, "verify": valid}));
        }
        "sign" => {
            EifSigner::new(Some(SignKeyData::new(&a[3], Path::new(&a[4])).unwrap())).unwrap().sign_image(&a[2]).unwrap();
        }
        _ => panic!(),
    }
}
